"""The rule: what a response answers, and whether that equals the reference. 0 or 1, never a model.

A response states its answer in "… answer is …" sentences, in boxes and between answer tags; the last
statement that holds an answer of the task's kind counts. Where none states one, the last that mentions one
does. An echo of the template's placeholder is no answer. See `reading` for the grammar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from spell_megatron.selfplay import numbers
from spell_megatron.selfplay.numbers import parse_number
from spell_megatron.selfplay.reading import letters, texts
from spell_megatron.selfplay.reading.statements import Statement, opened, statements
from spell_megatron.selfplay.reading.texts import normalise
from spell_megatron.selfplay.reading.thoughts import strip_thinking
from spell_megatron.types import Question

TOLERANCE = 0.0015
"""Relative difference within which two numbers are equal: 0.15 %."""
SCALES = (100.0, 1e3, 1e6, 1e9)
"""Factors that a percent sign, "thousand", "million" or "billion" stand for."""
_LAYERS = 8
"""Brackets, quotes and delimiters around a number."""


def rule_reward(task: str, response: str, question: Question) -> float:
    """1.0 if the response's answer is the reference by the task's rule, else 0.0."""
    answer = extract_answer(task, response)
    return float(answer is not None and is_correct(task, answer, question.answer))


def extract_answer(task: str, response: str) -> str | None:
    """The answer that a response gives, of the task's kind; None where it gives none."""
    text = strip_thinking(response)
    if text is None:
        return None
    found = list(statements(text))
    for read in _READERS.get(task, _WORDS):
        for statement in found:
            if (answer := read(statement)) is not None:
                return answer
    return None


def is_correct(task: str, answer: str, reference: str) -> bool:
    """Compare an extracted answer with the reference, as the task asks."""
    if task == "docmath_qa":
        return math_equal(answer, reference)
    if task == "doc_mc":
        return answer.strip() == reference.strip()
    return cover_exact_match(answer, reference)


def math_equal(prediction: str, reference: str) -> bool:
    """Numeric equality within 0.15 %, after rounding up to 3 decimals, or up to a factor of `SCALES`.

    The sign counts only in the first of the three: financial statements write losses both ways, and
    a difference of scale is most often one of notation.
    """
    p, r = parse_number(str(prediction)), parse_number(str(reference))
    if p is None or r is None:
        return False
    small, large = sorted((abs(p), abs(r)))
    if any(small > 0 and abs(small * scale - large) <= TOLERANCE * large for scale in SCALES):
        return True
    return _ceil(small) == _ceil(large) or abs(p - r) <= TOLERANCE * abs(r)


def cover_exact_match(prediction: str, reference: str) -> bool:
    """The normalised reference is a substring of the normalised prediction."""
    wanted = normalise(reference)
    return bool(wanted) and wanted in normalise(prediction)


def _ceil(number: float) -> float:
    """Rounded up to 3 decimals; numbers too large to have decimals stay as they are."""
    return math.ceil(number * 1000) / 1000 if number < 1e12 else number


def _stated_number(statement: Statement) -> str | None:
    """A number that is the whole statement, the only one in the brackets that open it, or what it begins with."""
    text, bracketed = statement.text, False
    for _ in range(_LAYERS):
        within = opened(text)
        if within is None or (within[1].strip(" .,;:!*_") and numbers.is_calculation(text)):
            break
        text, bracketed = within[0], True
    whole = text.strip(" \t\r\n*_").rstrip(" .*_")
    if numbers.is_calculation(whole) or (bracketed and parse_number(whole) is not None):
        return whole
    return numbers.first(whole)


def _mentioned_number(statement: Statement) -> str | None:
    return numbers.any_of(statement.text)


_Reader = Callable[[Statement], str | None]
_WORDS: Sequence[_Reader] = (texts.stated, texts.mentioned, texts.remarked)
_READERS: Mapping[str, Sequence[_Reader]] = {
    "docmath_qa": (_stated_number, _mentioned_number),
    "doc_mc": (letters.stated, letters.mentioned),
}
"""How a task's statements are read: first for what one states, then for what one at least mentions."""
