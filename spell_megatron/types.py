"""The nouns that flow through the system. No torch, no I/O: every room may import this module.

    Cluster of Documents -> (self-play) -> Rollouts -> Episode -> Groups -> TrainBatch -> (learner)

Tokens in, tokens out: the ids that the engine sampled are the ids that are trained on; text is
decoded only to be parsed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Tokens = Sequence[int]
Finish = Literal["stop", "length"]
Experts: TypeAlias = "np.ndarray"
"""Which experts each of some tokens went to in each layer, unsigned integers `[tokens, layers, top k]`."""
Updates = tuple[tuple[int, int], ...]
"""`(place, version)`: new weights that a completion went on under, from the token at that place on."""


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
    sampled from (temperature and truncation applied), by the weights that sampled it: those numbered `version`,
    which began it and are its oldest, and those of `updates` from their places on. `finish` is "length" where the
    completion was cut at the token limit.

    `prompt_experts` and `experts` are what the engine chose for prompt and completion, where it was asked to tell; the
    last token went through no layer and has none.
    """

    prompt: Tokens
    tokens: Tokens
    logprobs: Sequence[float]
    finish: Finish
    version: int
    updates: Updates = ()
    prompt_experts: Experts | None = field(default=None, compare=False, repr=False)
    experts: Experts | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion as the learner sees it: tokens, and what each of them is worth.

    `weights[i]` multiplies the policy-gradient term of `tokens[i]`: an advantage in reinforcement
    learning, 1.0 in supervised warm-up. `logprobs` are the engine's, and `version` and `updates` number the
    weights that they are of, as in a Rollout (empty and None where no engine made the tokens). `experts` are those
    that the learner is to use for its first tokens.
    """

    tokens: Tokens
    weights: Sequence[float]
    logprobs: Sequence[float] = ()
    version: int | None = None
    updates: Updates = ()
    experts: Experts | None = field(default=None, compare=False, repr=False)


def version_spans(made: Rollout | Sample) -> list[tuple[int, int, int]]:
    """`(version, first, end)`: which weights sampled its tokens [first, end). Empty where no engine did."""
    if made.version is None:
        return []
    begins = [(0, made.version), *made.updates]
    ends = [*(place for place, _ in made.updates), len(made.tokens)]
    return [(version, first, end) for (first, version), end in zip(begins, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class Group:
    """Completions of one prompt. The prompt is computed once and shared by all of them, and so are its experts."""

    prompt: Tokens
    samples: tuple[Sample, ...]
    experts: Experts | None = field(default=None, compare=False, repr=False)

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

    def group_shares(self) -> list[float]:
        """Factors that turn the token mean into the mean over groups of each one's token mean."""
        tokens, groups = self.response_tokens, len(self.groups)
        return [tokens / (groups * max(group.response_tokens, 1)) for group in self.groups]

    def without(self, dropped: Collection[int]) -> TrainBatch:
        """The batch without some groups, by their places."""
        return TrainBatch(tuple(group for place, group in enumerate(self.groups) if place not in dropped))


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its reference answer, as the questioner wrote it (or a held-out set has it).

    `options` maps the letters A-D to the choices; it is empty for free-form tasks, and `answer`
    is then the reference text, otherwise the letter. `labels` say in what a held-out question is measured apart
    from others, besides its task: `{"links": "3"}`.
    """

    task: str
    text: str
    answer: str
    options: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
