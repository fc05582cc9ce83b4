"""Questions whose answer is a number, calculated from figures in the documents. The rule is equality within 0.15 %."""

from __future__ import annotations

import math

from spell_megatron.selfplay import numbers
from spell_megatron.selfplay.numbers import parse_number
from spell_megatron.selfplay.reading.statements import Statement, alone, denies, is_remark, opened
from spell_megatron.selfplay.tasks.task import BAD_FORMAT, Draft, Failure, Task, scalar_of
from spell_megatron.types import Question

NOT_A_NUMBER = Failure("dropped:not_a_number")
TOLERANCE = 0.0015
"""Relative difference within which two numbers are equal: 0.15 %."""
SCALES = (100.0, 1e3, 1e6, 1e9)
"""Factors that a percent sign, "thousand", "million" or "billion" stand for."""
_LAYERS = 8
"""Brackets, quotes and delimiters around a number."""


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
    return rounded_up(small) == rounded_up(large) or abs(p - r) <= TOLERANCE * abs(r)


def rounded_up(number: float) -> float:
    """Rounded up to 3 decimals; numbers too large to have decimals stay as they are."""
    return math.ceil(number * 1000) / 1000 if number < 1e12 else number


def stated(statement: Statement) -> str | None:
    """A number that is the whole statement, the only one in the brackets that open it, or what it begins with."""
    text, bracketed = statement.text, False
    for _ in range(_LAYERS):
        within = opened(text)
        rest = within[1].strip(" .,;:!*_") if within is not None else ""
        if within is None or rest[:1] in ("^", "/") or (rest and numbers.is_calculation(text)):
            break
        if numbers.is_doubted(within[0], within[1]):
            return None
        text, bracketed = within[0], True
    whole = text.strip(" \t\r\n*_").rstrip(" .*_")
    if numbers.is_calculation(whole) or (bracketed and parse_number(whole) is not None):
        return whole
    return numbers.first(whole)


def mentioned(statement: Statement) -> str | None:
    """The only number in a statement that denies nothing and is no remark."""
    return None if is_remark(statement) else remarked(statement)


def remarked(statement: Statement) -> str | None:
    """The same of remarks, too, where nothing else holds one."""
    text = alone(statement.text)
    return None if denies(text) else numbers.only(text)


class Number(Task):
    name, label = "docmath_qa", "math"
    readers = (stated, mentioned, remarked)

    def question(self, draft: Draft) -> Question | Failure:
        """Zero is no answer: it is what stands where nothing was calculated."""
        reference = scalar_of(draft.fields.get("answer"))
        if draft.unanswered(reference):
            return BAD_FORMAT
        return Question(self.name, draft.text, reference) if parse_number(reference) else NOT_A_NUMBER

    def is_correct(self, answer: str, reference: str) -> bool:
        return math_equal(answer, reference)
