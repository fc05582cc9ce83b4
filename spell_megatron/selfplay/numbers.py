"""Numbers as people write them: "$1,234.5 million", "1{,}234", "1 1/2", "4.5 × 10⁴", "approximately 12 %".

A small recursive-descent parser over a bounded text. Nothing is evaluated: the grammar has numbers,
the four operations, powers, roots and brackets, and the result is a finite float or None. Dates,
ranges, quarters and ordinals are no numbers.

Signs of currency, percent and "thousand", "million", "billion" are read and carry no factor: numeric equality holds
up to the factors that they stand for (see `tasks.number.math_equal`). Of other words of scale a part is left
(`reading.notation`): "1.5 trillion" is 1500.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from spell_megatron.selfplay.reading.notation import DATE, tidy

_LONGEST = 200
"""Characters of a number; anything longer is not one."""
_DEEPEST = 32
"""Brackets within each other."""

_PRECISION = re.compile(r"[ -](?:decimal|significant|digit|s\.? ?f\b|d\.? ?p\b)")
_UNITS = (
    r"hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|yrs?|feet|foot|ft|inch(?:es)?"
    r"|lbs?|oz|[ckm]m|kg|[hmdsg]"
)
_OTHER = re.compile(
    r"[\s*_']*(?:(?:[;,|]+(?=(?:[\d\W]|and|or)*$)|(?:[;,]\s*)?(?:[a-z]+\s+)?(?:or|and/or)|(?:[a-z]+\s+)?and|to)"
    r"(?=[\s(*_'+-]*\.?\d)"
    r"|(?<=\s)in(?=\s+(?!(?:1[5-9]|2[01])\d\d\b)\d+\W*$)"  # "1 in 5", but "42 in 2019"
    rf"|(?:{_UNITS})\b\.?,?\s+(?=\d[\d.]*\s?(?:{_UNITS}|in)\b))",  # 2 hours 30 minutes
    re.IGNORECASE,
)
"""Between a number and one more."""
_UP_TO = re.compile(r"-[\s(*']*\.?\d[\d.]*[\s)*']*$")
_NAMED = re.compile(
    r"^(?:[A-Za-z]\w{0,20} ?=|[( ]*(?:1[5-9]|2[01])\d\d ?: (?=[-+( ]*\.?\d[\d.,e ]*[^\d]{0,40}$))"
)
"""What a number is of: "x = 42", "2019: 42 tonnes". With more numbers behind it a year may be one of them."""
_PRICE = re.compile(r"[\s(*]*[$£€¥]")
_RATIO = re.compile(r"\d : $")
_MIXED_AHEAD = re.compile(r"\d+ \d+ ?/ ?\d")
_YEARS = range(1500, 2200)
_SAME = (1.0, 60.0, 100.0, 1e3, 1e6, 1e9)
"""Ratios of one value in two notations: hours and minutes, a share and a percentage, words of scale."""

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3}(?![\w.]))?)|(?P<sign>\*\*|[-+*/^()=]|sqrt)"
    r"|(?P<other>[^\W\d]\w*(?:-\w+)*|.))",
    re.DOTALL,
)


def parse_number(text: str) -> float | None:
    """The number that a short text states; None where it states none, several, or an endless one."""
    if len(text) > _LONGEST:
        return None
    text = tidy(text)
    value = _equation(text)
    if value is None and len(runs := list(_runs(text))) == 1:
        value = _value(_last_side(runs[0].text))
    return value


def is_calculation(text: str) -> bool:
    """Whether a short text is nothing but a number or a calculation with one."""
    return len(text) <= _LONGEST and _equation(tidy(text)) is not None


def first(statement: str) -> str | None:
    """The number with which a statement begins, or that it gives behind its last colon or equals sign."""
    for part in (statement, *_last_sides(statement)):
        text = tidy(part[: 2 * _LONGEST])
        text = text if _PRICE.match(part) else _NAMED.sub("", text)
        run = next(_runs(text), None)
        if run is None or not text.lstrip(" (=").startswith(run.text.lstrip(" (=")):
            continue
        number, behind = _last_side(run.text), text[run.end :]
        value = _value(number)
        if value is not None and not _PRECISION.match(behind) and not _is_followed(value, behind):
            return number
    return None


def is_doubted(number: str, behind: str) -> bool:
    """Whether another number follows one that stands in brackets or quotes: whoever gives two of them, gives none."""
    value, behind = parse_number(number), tidy(behind[: 2 * _LONGEST])
    return value is not None and (_UP_TO.match(behind) is not None or _is_followed(value, behind))


def _is_followed(value: float, behind: str) -> bool:
    if (between := _OTHER.match(behind)) is None:
        return False
    behind = behind[between.end() :]
    run = next(_runs(behind), None)
    other = _value(_last_side(run.text)) if run is not None else None
    if run is None or other is None:
        return True
    is_year = between[0].strip(" *_'")[:1] in (",", ";") and run.text.isdigit() and other in _YEARS
    if (is_year and value not in _YEARS) or _PRECISION.match(behind, run.end):
        return False
    small, large = sorted((abs(value), abs(other)))
    return value * other < 0 or not any(math.isclose(small * ratio, large) for ratio in _SAME)


def only(statement: str) -> str | None:
    """The number written in a statement, where there is but one besides how many decimals it has."""
    text = tidy(statement[: 2 * _LONGEST])
    runs = (run for run in _runs(text) if not _PRECISION.match(text, run.end))
    found = [number for run in runs if _value(number := _last_side(run.text)) is not None]
    return found[0] if len(set(map(_value, found))) == 1 else None


def _last_side(run: str) -> str:
    """What a stretch comes to, where it is an equation."""
    return run.rpartition("=")[2].strip()


def _last_sides(statement: str) -> Iterator[str]:
    for mark in ("=", "\u2248", ": "):
        before, found, side = statement.rpartition(mark)
        if found and before and not _RATIO.search(before + mark):
            yield side


class _Run(NamedTuple):
    """A stretch of a text, and where it ends there."""

    text: str
    end: int


def _runs(text: str) -> Iterator[_Run]:
    """Stretches of digits and signs that hold a number or a date; what is glued to a word (Q3, m^2) is no number."""
    start = end = word = -1  # where the stretch begins and ends, and where the last word ends
    before = -1  # where the number stands that the last token was
    depth, full = 0, False
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        token, begin = match[kind], match.start(kind)
        is_number = kind == "number" or token == DATE
        beside = is_number and before >= 0 and not _MIXED_AHEAD.match(text, before)  # "40 2"
        aside = token == "(" and full and match.start() == end < begin  # "42 (40 + 2)"
        if beside or aside:
            yield _Run(_balanced(text[start:end]), end)
            start, depth, full = -1, 0, False
        before = begin if is_number and begin != word else -1
        if begin == word and token not in ("(", "="):
            word = match.end()
        elif (kind == "other" and not is_number) or (token == ")" and not depth):
            if full:
                yield _Run(_balanced(text[start:end]), end)
            start, depth, full = -1, 0, False
            word = match.end() if token[-1].isalnum() else -1
        elif start >= 0 or is_number or token in ("(", "-", "+", "sqrt"):
            start = begin if start < 0 else start
            depth += {"(": 1, ")": -1}.get(token, 0)
            if is_number or token == ")":
                full, end = full or is_number, match.end()
    if full:
        yield _Run(_balanced(text[start:end]), end)


def _balanced(run: str) -> str:
    """Without the brackets that open a stretch and are closed outside of it."""
    while run.startswith("(") and run.count("(") > run.count(")"):
        run = run[1:].lstrip()
    return run


def _equation(text: str) -> float | None:
    """The last side of an equation whose other sides are names or calculations."""
    *others, last = text.split("=")
    if any(_Expression(side).total() is None and any(map(str.isdigit, side)) for side in others):
        return None
    return _value(last)


def _value(text: str) -> float | None:
    return _Expression(text).value()


def _bare(tokens: list[str]) -> list[str]:
    """Tokens without the brackets around single numbers."""
    out: list[str] = []
    for token in tokens:
        out.append(token)
        while len(out) > 2 and out[-3] == "(" and out[-2][-1].isdigit() and out[-1] == ")":
            out[-3:] = [out[-2]]
    return out


class _Expression:
    """sum := product ((+|-) product)*; product := power ((*|/) power)*; power := (+|-)* atom (^ power)?

    atom := number | number number/number (a mixed fraction) | sqrt? ( sum )
    """

    def __init__(self, text: str) -> None:
        matches = list(_TOKEN.finditer(text.strip()))
        known = len(matches) <= _LONGEST and all(match.lastgroup != "other" for match in matches)
        self.tokens = [match[match.lastgroup or 0] for match in matches] if known else []
        self.close = re.search(r"\d-\d", text) is not None
        self.depth = 0

    def value(self) -> float | None:
        """The whole expression, finite, or None; None for a range, too."""
        return None if (value := self.total()) is None or self._is_range() else value

    def total(self) -> float | None:
        """The same where "=" follows, so that "3 - 5" is a difference."""
        self.at = 0
        try:
            value = self._sum()
        except (ValueError, OverflowError, ZeroDivisionError):
            return None
        return value if self.at == len(self.tokens) and math.isfinite(value) else None

    def _is_range(self) -> bool:
        """3-5, 2018-19, 2018/19: an ascending pair, or a year and the next."""
        tokens = self.tokens
        if "/" not in tokens:  # of a fraction they are its own
            tokens = _bare(tokens)
        while len(tokens) > 2 and tokens[0] == "(" and tokens[-1] == ")":
            tokens = tokens[1:-1]
        negative = tokens[:1] == ["-"]
        if len(tokens) - negative != 3 or tokens[-2] not in ("-", "/") or not tokens[negative][0].isdigit():
            return False
        first, sign, second = tokens[negative:]
        low, high = float(first) * (-1 if negative else 1), float(second)
        is_year = first.isdigit() and low in _YEARS
        if sign == "/":
            return is_year and high in (low + 1, (low + 1) % 100)
        return low <= high or (is_year and high < 100 and self.close)

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
        if self._take("sqrt"):
            return math.sqrt(self._atom())
        if self._take("("):
            self.depth += 1
            if self.depth > _DEEPEST:
                raise ValueError("too many brackets")
            value = self._sum()
            if not self._take(")"):
                raise ValueError("an open bracket")
            self.depth -= 1
            return value
        if self.at == len(self.tokens):
            raise ValueError("a number is missing")
        self.at += 1
        return float(self.tokens[self.at - 1]) + self._fraction()

    def _fraction(self) -> float:
        """The proper fraction right behind a whole number, else 0."""
        match self.tokens[self.at - 1 : self.at + 3]:
            case [whole, above, "/", below] if whole.isdigit() and above.isdigit() and below.isdigit():
                if int(above) < int(below):
                    self.at += 3
                    return int(above) / int(below)
        return 0.0
