"""Numbers as people write them: "$1,234.5 million", "approximately 12 %", "3/4", "2 x 10^6".

A small recursive-descent parser over a bounded text. Nothing is evaluated: the grammar has numbers,
the four operations, powers and brackets, and the result is a finite float or None.

Signs of currency, percent and words of scale are read and carry no factor: numeric equality holds
up to the factors that they stand for (see `grading.math_equal`).
"""

from __future__ import annotations

import math
import re

_LONGEST = 200
"""Characters of a number; anything longer is not one. Bounds the parser's depth, too."""

_LOOKALIKES = {0x2212: "-", 0x2013: "-", 0x2248: "="}
"""Minus sign, en dash and "approximately equal", as ASCII."""

_WORDS = re.compile(
    r"approximately|approx\.?|about|around|roughly|nearly|almost|circa"
    r"|thousands?|millions?|billions?|trillions?|per ?cent|percentage points?"
    r"|us\$|usd|eur|gbp|rmb|cny|jpy|us|dollars?|euros?|pounds?|yuan|yen|cents?",
    re.IGNORECASE,
)
_SIGNS = re.compile(r"\\(?:text|mathrm|mbox)(?=\{)|\\(?:left|right|,|;|!)|[$£€¥₹%°`~{}\\]")
_LOOSE_SIGN = re.compile(r"([-+])\s+(?=[\d.])")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]{1,60})\}\{([^{}]{1,60})\}")
_TIMES = re.compile(r"\\times|\\cdot|\u00d7|\u00b7|(?<=\d) ?[xX] ?(?=\d)")
_TOKEN = re.compile(
    r"\s*(?:(\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?|\.\d+(?:[eE][+-]?\d{1,3})?)|(\*\*|[-+*/^()]))"
)
_FOUND = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?(?:\s?/\s?\d+(?:\.\d+)?)?")


def parse_number(text: str) -> float | None:
    """The number that a short text states; None where it states none, several, or an endless one."""
    if len(text) > _LONGEST:
        return None
    text = _tidy(text)
    value = _Expression(text).value()
    if value is None:
        found = _FOUND.findall(text)
        if len(found) == 1:
            value = _Expression(found[0]).value()
    return value


def first_number(text: str) -> str | None:
    """The first number written in a sentence, as it stands there without thousands separators."""
    match = _FOUND.search(_tidy(text[: 2 * _LONGEST]))
    return match.group() if match else None


def _tidy(text: str) -> str:
    """ASCII signs only, no separators, no units; of an equation the last side."""
    text = text.strip(" \t\r\n*").rstrip(" .*").translate(_LOOKALIKES)
    text = _FRACTION.sub(r"((\1)/(\2))", text)
    text = _TIMES.sub("*", text)
    text = re.sub(r"(?<=\d),(?=\d)", "", text).rpartition("=")[2]
    text = _SIGNS.sub(" ", _WORDS.sub(" ", text))
    return _LOOSE_SIGN.sub(r"\1", text).strip()


class _Expression:
    """sum := product ((+|-) product)*; product := power ((*|/) power)*; power := (+|-)* atom (^ power)?"""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position = 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                self.tokens = []
                return
            self.tokens.append(match.group(1) or match.group(2))
            position = match.end()

    def value(self) -> float | None:
        """The whole expression, finite, or None."""
        self.at = 0
        try:
            value = self._sum()
        except (ValueError, OverflowError, ZeroDivisionError):
            return None
        return value if self.at == len(self.tokens) and math.isfinite(value) else None

    def _take(self, *wanted: str) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at] in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def _sum(self) -> float:
        value = self._product()
        while sign := self._take("+", "-"):
            value = value + self._product() if sign == "+" else value - self._product()
        return value

    def _product(self) -> float:
        value = self._power()
        while sign := self._take("*", "/"):
            value = value * self._power() if sign == "*" else value / self._power()
        return value

    def _power(self) -> float:
        if sign := self._take("+", "-"):
            return self._power() if sign == "+" else -self._power()
        value = self._atom()
        return math.pow(value, self._power()) if self._take("^", "**") else value

    def _atom(self) -> float:
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                raise ValueError("an open bracket")
            return value
        if self.at == len(self.tokens):
            raise ValueError("a number is missing")
        self.at += 1
        return float(self.tokens[self.at - 1])
