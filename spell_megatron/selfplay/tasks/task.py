"""What a task is: what the questioner must give, how an answer is read, and when it is right.

Everything that asks for a task's particulars asks its record: parsing, grading, prompts, plots. A new one is a
subclass and its templates (see `examples/table`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from spell_megatron.selfplay.reading import FILLERS
from spell_megatron.selfplay.reading.statements import Statement
from spell_megatron.types import Question

Reader = Callable[[Statement], str | None]
"""The answer that a statement holds, of the reader's kind; None where it holds none."""

_SAID = ("L", "N", "Sm", "Sc", "So")
"""Categories of what says something: letters, digits and symbols, such as +, €, °. Others only surround it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a text is no question. `outcome` is `bad_format` (penalised) or `dropped:<why>` (not)."""

    outcome: str


BAD_FORMAT = Failure("bad_format")
LONG_REFERENCE = Failure("dropped:long_reference")


@dataclass(frozen=True, slots=True)
class Draft:
    """What a questioner wrote: a JSON object of anything, of which `text` is the question.

    `key` is what it was told to make the answer (`Task.key`). `tokens` measures a text, and a free reference has at
    most `max_tokens`. `is_echo` tells whether a text is one of its prompt's example.
    """

    text: str
    fields: Mapping[str, Any]
    key: str | None
    tokens: Callable[[str], int]
    max_tokens: int
    is_echo: Callable[[str], bool]

    def unanswered(self, text: str) -> bool:
        """Whether a text is a gap that was not filled in, or the example's own."""
        return is_unfilled(text) or self.is_echo(text)


class Task:
    """A kind of question. Stateless; one instance of each is in the registry."""

    name: ClassVar[str]
    """In recipes, in the names of templates (`{role}_{name}.j2`) and of metrics."""
    label: ClassVar[str]
    """In plots and tables."""
    readers: ClassVar[Sequence[Reader]]
    """How statements are read: first for what one states, then for what one at least mentions."""
    templates: ClassVar[Mapping[str, str]] = {}
    """Templates by file name, of a task that the styles of `model.prompts` do not know."""

    def key(self, random: Random) -> str | None:
        """What the questioner is told to make the answer, so that answers stay balanced; None where it is free."""
        return None

    def question(self, draft: Draft) -> Question | Failure:
        """The question that a draft is, or why it is none. Never raises."""
        raise NotImplementedError

    def is_correct(self, answer: str, reference: str) -> bool:
        """Whether an answer that was read is the reference."""
        raise NotImplementedError

    def trial(self) -> Question:
        """A question of this task, to try templates with."""
        return Question(self.name, "what-is-asked", "the-reference")


def text_of(value: Any) -> str:
    """A string without its margins and without half characters; empty for anything else."""
    return value.encode("utf-8", "replace").decode("utf-8").strip() if isinstance(value, str) else ""


def scalar_of(value: Any) -> str:
    """A string or a number as text; empty for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(value) if is_number else text_of(value)


def is_unfilled(text: str) -> bool:
    """Whether nothing is seen in a text but the gap that a form has: "…", "<...>", "**"."""
    return not any(
        unicodedata.category(character).startswith(_SAID) and character not in f"<>{FILLERS}"
        for character in text
    )
