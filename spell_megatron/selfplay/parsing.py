"""What a model wrote, read with suspicion.

Model output is hostile: it may be huge, nested a million levels deep or broken anywhere. Every
function here takes any string, returns in bounded time and never raises. Only the tail of a text is
read, because an answer stands at the end of the reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from spell_megatron.selfplay.grading import rule_reward
from spell_megatron.selfplay.numbers import parse_number
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.reading.objects import last_object
from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.selfplay.reading.thoughts import is_outside, strip_thinking
from spell_megatron.types import Question

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a text is no question. `outcome` is `bad_format` (penalised) or `dropped:<why>` (not)."""

    outcome: str


BAD_FORMAT = Failure("bad_format")
OVER_LONG = Failure("dropped:over_long")
NOT_A_NUMBER = Failure("dropped:not_a_number")
LONG_REFERENCE = Failure("dropped:long_reference")
UNREACHABLE = Failure("dropped:unreachable_reference")


_UNFILLED = re.compile(r"[\s.\u2026_?()\[\]<>\u2010-\u2015-]*")
"""A gap that was left as it stands in a form."""


def parse_question(
    text: str,
    task: str,
    key: str | None = None,
    *,
    count: Callable[[str], int] = lambda text: len(text.split()),
    max_reference_tokens: int = 40,
    examples: Collection[str] | None = None,
) -> Question | Failure:
    """The question that a questioner wrote, or why there is none.

    `key` is the letter under which a `doc_mc` question was asked to put the correct choice; `count`
    measures references of `doc_general_qa` in tokens. `examples` are the texts of the prompt's own example
    (`Prompts.examples`), whose echo is no question; without them, those of the shipped prompts.
    """
    found = last_object(text, "question")
    if found is None or not is_outside(text, found.start, found.end):
        return OVER_LONG if strip_thinking(text) is None else BAD_FORMAT
    question, reference = _text(found.value["question"]), found.value.get("answer")
    echoes = _shipped(task) if examples is None else examples
    if _UNFILLED.fullmatch(question) or _echo(question, echoes):
        return BAD_FORMAT
    if task == "doc_mc":
        return _choice(question, reference, found.value.get("options"), key)
    text = _scalar(reference) if task == "docmath_qa" else _text(reference)
    if _UNFILLED.fullmatch(text) or _echo(text, echoes):
        return BAD_FORMAT
    if task == "docmath_qa":
        return Question(task, question, text) if parse_number(text) else NOT_A_NUMBER
    if len(text) > 64 * max_reference_tokens or count(text) > max_reference_tokens:
        return LONG_REFERENCE
    asked = Question(task, question, text)
    return asked if rule_reward(task, f"The correct answer is ({text}).", asked) else UNREACHABLE


_VERDICT = re.compile(r"""(["'`\u201c\u2018\u00ab]?)\[\[(YES|NO)\]\]""", re.IGNORECASE)


def parse_verdict(text: str) -> int | None:
    """1 for `[[YES]]`, 0 for `[[NO]]`, None for neither, both, or an unfinished thought.

    One in quotation marks was said by somebody else, where there is one without.
    """
    found = _VERDICT.findall(strip_thinking(text) or "")
    own = [mark for quote, mark in found if not quote] or [mark for _, mark in found]
    votes = {mark.upper() for mark in own}
    return int(votes == {"YES"}) if len(votes) == 1 else None


def _choice(question: str, reference: Any, options: Any, key: str | None) -> Question | Failure:
    """A `doc_mc` question: four different choices A-D, the correct one where it was asked for."""
    letter = _text(reference)
    if letter not in LETTERS or (key is not None and letter != key) or not isinstance(options, dict):
        return BAD_FORMAT
    choices = {str(name).strip(): _scalar(choice) for name, choice in options.items()}
    if len(options) != len(LETTERS) or set(choices) != set(LETTERS):
        return BAD_FORMAT
    ordered = {name: text for name in LETTERS if (text := choices[name])}
    if len({text.casefold() for text in ordered.values()}) != len(LETTERS):
        return BAD_FORMAT
    if any(map(_UNFILLED.fullmatch, ordered.values())):
        return BAD_FORMAT
    return Question("doc_mc", question, letter, ordered)


def _text(value: Any) -> str:
    """A string without its margins and without half characters; empty for anything else."""
    return value.encode("utf-8", "replace").decode("utf-8").strip() if isinstance(value, str) else ""


def _scalar(value: Any) -> str:
    """A string or a number as text; empty for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(value) if is_number else _text(value)


def _echo(text: str, examples: Collection[str]) -> bool:
    return normalise(text) in examples


@cache
def _shipped(task: str) -> Collection[str]:
    return Prompts("full").examples(task)
