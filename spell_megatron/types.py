"""The nouns that flow through the system. No torch, no I/O: every room may import this module.

    Cluster of Documents -> (self-play) -> Rollouts -> Episode -> Groups -> TrainBatch -> (learner)

Tokens in, tokens out: the ids that the engine sampled are the ids that are trained on; text is
decoded only to be parsed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

Tokens = Sequence[int]
Finish = Literal["stop", "length"]


class SpellError(Exception):
    """A fault that the user can mend. The message says what is wrong, where, and what to do.

    The command line prints it without a stack trace and exits with `exit_code`.
    """

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Document:
    """One text that a question may be asked about."""

    id: str
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Documents that belong together: what one responder reads."""

    id: str
    domain: str
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion as the engine sampled it.

    `logprobs[i]` is the log-probability of `tokens[i]` under the distribution that was actually
    sampled from (temperature and truncation applied), by the weights numbered `version`.
    `finish` is "length" where the completion was cut at the token limit.
    """

    prompt: Tokens
    tokens: Tokens
    logprobs: Sequence[float]
    finish: Finish
    version: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion as the learner sees it: tokens, and what each of them is worth.

    `weights[i]` multiplies the policy-gradient term of `tokens[i]`: an advantage in reinforcement
    learning, 1.0 in supervised warm-up. `logprobs` are the engine's, and `version` is the number of
    the weights that they are of (empty and None where no engine made the tokens).
    """

    tokens: Tokens
    weights: Sequence[float]
    logprobs: Sequence[float] = ()
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Completions of one prompt. The prompt is computed once and shared by all of them."""

    prompt: Tokens
    samples: tuple[Sample, ...]

    @property
    def response_tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What one optimizer update is made of. Roles are gone: only groups, tokens and weights."""

    groups: tuple[Group, ...]

    @property
    def response_tokens(self) -> int:
        """The denominator of the token mean, over every role and every rank."""
        return sum(group.response_tokens for group in self.groups)

    def without(self, dropped: Collection[int]) -> TrainBatch:
        """The batch without some groups, by their places."""
        return TrainBatch(tuple(group for place, group in enumerate(self.groups) if place not in dropped))


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its reference answer, as the questioner wrote it (or a held-out set has it).

    `options` maps the letters A-D to the choices; it is empty for free-form tasks, and `answer`
    is then the reference text, otherwise the letter.
    """

    task: str
    text: str
    answer: str
    options: dict[str, str] = field(default_factory=dict)
