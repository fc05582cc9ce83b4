"""What a benchmark is: items with prompts, a rule that scores an answer, and when to ask a judge.

A benchmark is one small file in `eval/benchmarks/`: a subclass of `Benchmark` that reads the public
data set's own rows and scores by the set's own rule. Everything else (asking, resuming, judging,
statistics, tables) is common and knows no benchmark by name.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from eval.data import Data
from spell_megatron.selfplay.reading.thoughts import CLOSE, strip_thinking

Mode = Literal["spell", "strict"]
"""`spell` is the paper's protocol. `strict` finds answers as self-play does, matches on word boundaries,
accepts every gold answer, and believes only a judge's last bracketed verdict."""

ProtocolName = Literal["paper", "official"]
"""`paper` asks every benchmark as the paper does; `official` asks the last ones as their own authors do."""

Cut = Literal["middle", "head", "skip"]
"""What happens to a prompt beyond the input limit: middle ids are cut, the context loses its tail, it is skipped."""

Message = Mapping[str, str]
"""A chat message: `role` and `content`."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    `question` is what a judge is shown; `references` are the gold answers, the first one being the
    protocol's; `labels` place the item in subsets ("difficulty": "hard"). `context` is the stretch of
    the last message whose tail may be dropped (cut "head" alone). `max_tokens` is the output limit that the
    set's authors give the item's task. `facts` is what the scorer needs besides. Items of one
    `group` are one question to the figures, asked in several ways.
    """

    id: str
    messages: tuple[Message, ...]
    question: str
    references: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    context: str = ""
    max_tokens: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote. `finish` is "length" where it was cut; `tokens` counts what was sampled."""

    text: str
    finish: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Grade:
    """The rule's opinion of one answer.

    `score` is in [0, 1]. `prediction` is the extracted answer, None where there is none. `shown` is
    what a judge would be shown. `metrics` are secondary figures, each in [0, 1].
    """

    score: float
    prediction: str | None
    shown: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's opinion of one answer; `readings` holds every way of reading it that was asked for."""

    score: float
    readings: Mapping[str, float] = field(default_factory=dict)


class Ask(Protocol):
    """Put a prompt to the judge until `parse` accepts its reply; raises `Unjudged` where it never does."""

    def __call__(self, prompt: str, parse: Callable[[str], T | None]) -> Awaitable[T]: ...


class Unjudged(Exception):
    """The judge gave no usable verdict: the sample is counted as unjudged, not as wrong."""


class Unreadable(Unjudged):
    """The judge answered every time, but never in a form that can be read."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a benchmark is asked under one protocol. The defaults are the paper's (appendices E.2, F.2, F.3)."""

    greedy: bool = False
    """Temperature 0 and one sample, whatever was asked for."""
    max_tokens: int = 4_096
    """Output tokens of a model that answers at once."""
    thinking_tokens: int = 20_000
    """Output tokens of a model that reasons first, its reasoning included."""
    task_lengths: bool = False
    """A model that answers at once has the output limit of the item's task instead."""
    cut: Cut = "middle"
    shortest: int = 0
    """Tokens of the shortest context that is asked about."""

    def output(self, item: Item | None, thinking: bool) -> int:
        """Output limit in tokens; of the longest item where none is given."""
        if thinking:
            return self.thinking_tokens
        return (item.max_tokens if item and self.task_lengths else None) or self.max_tokens


class Benchmark(ABC):
    """See the module's docstring. Class attributes are the protocol; methods read and score."""

    name: str
    title: str
    long: bool = False
    """Prompts may exceed the input limit: measured once per limit."""
    paper: Terms = Terms()
    """How the paper asks."""
    official: Terms = Terms()
    """How the set's own authors ask; as the paper does for its six main tasks."""
    reads_cut_answers: bool = True
    """An answer that was cut at the output limit is read as far as it goes; otherwise it is none."""
    isolated: bool = False
    """Scored in processes of its own, because a hostile answer can make the scorer run for ever."""
    judged: bool = False
    """A judge is asked where the rule failed (`judge` below)."""
    judge_replaces: bool = False
    """The judge's score replaces the rule's; otherwise the better of both counts."""
    rule: str = "rule"
    """How the score is called where no judge was asked."""
    macro: str = ""
    """Label over whose values the headline is an unweighted mean; a mean over questions where empty."""

    @abstractmethod
    def load(self, data: Data) -> list[Item]:
        """Every item of the data set's own layout. Rows that cannot be used are counted in `data.bad`."""

    @abstractmethod
    def grade(self, item: Item, answer: str | None, mode: Mode) -> Grade:
        """Score a final answer by the official rule. `answer` is None where reasoning never ended."""

    def terms(self, protocol: ProtocolName) -> Terms:
        return self.paper if protocol == "paper" else self.official

    def select(self, items: list[Item], count: Callable[[str], int], terms: Terms) -> list[Item]:
        """The items that count, given the model's tokens (`count` of a text)."""
        return items

    def seed(self, item: Item, sample: int, base: int) -> int:
        """The sampling seed of one sample of an item."""
        return base + sample

    def place(self, item: Item, count: Callable[[str], int]) -> Item:
        """The item with labels that need the model's tokens; called for the items that are asked."""
        return item

    async def judge(self, item: Item, grade: Grade, ask: Ask, mode: Mode) -> Verdict:
        raise NotImplementedError(f"{self.name} asks no judge")


def final_answer(completion: Completion, thinking_prefilled: bool = False) -> str | None:
    """The text after the reasoning, None where the reasoning never ended.

    A template that already wrote `<think>` into the prompt leaves no opening tag in the output, so
    an output that was cut before any closing tag is reasoning too.
    """
    if thinking_prefilled and completion.finish == "length" and CLOSE not in completion.text:
        return None
    return strip_thinking(completion.text)


_SLOT = re.compile(r"\{(\w+)\}")


def fill(template: str, **values: str) -> str:
    """Put values into `{name}` slots in one pass: a value that contains `{question}` stays as it is."""
    return _SLOT.sub(lambda match: values[match[1]], template)
