"""What a model wrote, read with suspicion.

Model output is hostile: it may be huge, nested a million levels deep or broken anywhere. Every
function here takes any string, returns in bounded time and never raises. Only the tail of a text is
read, because an answer stands at the end of the reasoning; the JSON decoder is tried at a bounded
number of places.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spell_megatron.selfplay.numbers import parse_number
from spell_megatron.types import Question

LETTERS = ("A", "B", "C", "D")

_TAIL = 32_768
"""Characters at the end of a text in which the JSON object is looked for."""
_ATTEMPTS = 32
"""Opening braces at which the decoder is tried, from the last one back."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a text is no question. `outcome` is `bad_format` (penalised) or `dropped:<why>` (not)."""

    outcome: str


BAD_FORMAT = Failure("bad_format")
OVER_LONG = Failure("dropped:over_long")
NOT_A_NUMBER = Failure("dropped:not_a_number")
LONG_REFERENCE = Failure("dropped:long_reference")


def strip_thinking(text: str) -> str | None:
    """The text after the last `</think>`; None where a `<think>` was opened and never closed."""
    answer = text.rpartition("</think>")[2]
    return None if "<think>" in answer else answer


def parse_question(
    text: str,
    task: str,
    key: str | None = None,
    *,
    count: Callable[[str], int] = lambda text: len(text.split()),
    max_reference_tokens: int = 40,
) -> Question | Failure:
    """The question that a questioner wrote, or why there is none.

    `key` is the letter under which a `doc_mc` question was asked to put the correct choice; `count`
    measures references of `doc_general_qa` in tokens.
    """
    answer = strip_thinking(text)
    if answer is None:
        return OVER_LONG
    fields = _last_object(answer)
    question, reference = _text(fields.get("question")), fields.get("answer")
    if not question:
        return BAD_FORMAT
    if task == "doc_mc":
        return _choice(question, reference, fields.get("options"), key)
    if task == "docmath_qa":
        return _number(question, reference)
    reference = _text(reference)
    if not reference:
        return BAD_FORMAT
    if len(reference) > 64 * max_reference_tokens or count(reference) > max_reference_tokens:
        return LONG_REFERENCE
    return Question(task, question, reference)


def parse_verdict(text: str) -> int | None:
    """1 for `[[YES]]`, 0 for `[[NO]]`, None for neither, both, or an unfinished thought."""
    decision = (strip_thinking(text) or "").upper()
    yes, no = "[[YES]]" in decision, "[[NO]]" in decision
    return None if yes == no else int(yes)


def _number(question: str, reference: Any) -> Question | Failure:
    """A `docmath_qa` question: the reference is one number that is not zero."""
    text = _scalar(reference)
    if text is None:
        return BAD_FORMAT
    return Question("docmath_qa", question, text) if parse_number(text) else NOT_A_NUMBER


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
    return Question("doc_mc", question, letter, ordered)


def _text(value: Any) -> str:
    """A string without its margins and without half characters; empty for anything else."""
    return value.encode("utf-8", "replace").decode("utf-8").strip() if isinstance(value, str) else ""


def _scalar(value: Any) -> str | None:
    """A string or a number as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return _text(value) if isinstance(value, str) else repr(value)


def _last_object(text: str) -> dict[str, Any]:
    """The last JSON object that has a question; an empty one where there is none.

    Reading from the last brace back finds inner objects (the options) first: they have no question
    and are passed over.
    """
    tail = text[-_TAIL:]
    start = len(tail)
    for _ in range(_ATTEMPTS):
        start = tail.rfind("{", 0, start)
        if start < 0:
            break
        try:
            value, _end = _DECODER.raw_decode(tail, start)
        except (ValueError, RecursionError):
            continue
        fields = {name.strip(): field for name, field in value.items()}
        if "question" in fields:
            return fields
    return {}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)
