"""Answers in words, and when two of them are the same.

"The answer is (Paris), because …" and "the correct answer is Paris" state one; "I hope the answer is clear" and
"the answer is in document 2" are remarks about one, and count only where no answer is stated.
"""

from __future__ import annotations

import re
import string
import unicodedata

from spell_megatron.selfplay.reading.latex import plain
from spell_megatron.selfplay.reading.notation import SCALE, ZEROS
from spell_megatron.selfplay.reading.statements import EDGES, Statement, alone, is_remark, opened

_LONGEST = 1_000
_PLACEHOLDERS = {
    "insert answer here",
    "insert your answer here",
    "your answer",
    "answer",
    "insert letter here",
    "",
}
_ENDS = re.compile(
    r"\W*$|\s*[.,;:!?)]|\s*[*_\"\u201d]*[.,;:!]|[\s*_]+(?:because|since|as|which|and|according|based|for|given|due)\b"
)
_AND = re.compile(r"[\s*_]{0,8}(?:[,;]\s{0,4}(?:and\b\s{0,4})?|(?:and\b|&)\s{0,4})[*_]?")
"""Between what stands in brackets or quotes and more of it."""
_ASIDE = re.compile(
    r"[(\[](?:see\b|.*\b(?:is|are|was|were|has|had)\b)|.?\W*(?:[Dd]ocument|[Ss]ource|[Pp]assage)s? ?\d"
)
"""What stands in brackets and is no name."""
_NAMES = 64
_QUOTES = "\"'`$\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb\u2039\u203a\u300c\u300d"

_ACCENTS = {0xB4: "'", 0xA8: '"'}
"""Accents that are typed for an apostrophe or quotation mark, and decompose into a blank and more."""


class _Dropped(dict[int, int | None]):
    """For `str.translate`: what is left out of every script's text, and its digits in ASCII; filled as it is asked."""

    _CATEGORIES = ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sk", "Sm", "Cf")
    """Punctuation, modifiers, signs of mathematics, and what is invisible."""
    _APOSTROPHES = "\u02b9\u02ba\u02bb\u02bc\u02bd\u02cb"
    """Letters to Unicode."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        digit = unicodedata.decimal(character, None)
        if digit is not None:
            return self.setdefault(code, ord(str(digit)))
        drop = character in string.punctuation + self._APOSTROPHES
        drop = drop or unicodedata.category(character) in self._CATEGORIES
        return self.setdefault(code, None if drop else code)


class _Styles(dict[int, str]):
    """For `str.translate`: any quote as an apostrophe, any dash as a hyphen, nothing for the invisible."""

    def __missing__(self, code: int) -> str:
        character, category = chr(code), unicodedata.category(chr(code))
        if character in _QUOTES or character in _Dropped._APOSTROPHES or category in ("Pi", "Pf"):
            return self.setdefault(code, "'")
        if category == "Pd" or character == "\u2212":
            return self.setdefault(code, "-")
        return self.setdefault(code, "" if category == "Cf" else character)


_STYLES = _Styles()
_RAISED = re.compile("(?=[\u00b2\u00b3\u00b9\u2070-\u207f])")
"""Before a superscript, which is an ordinary character to NFKC."""
_LOOSE = re.compile(r"(?<![^\W\d]) (?=[^\W\d])|(?<!\d) (?=\d)| (?=\W)")
"""A blank that does not part two words or two numbers: "50 %", "5 km"."""
_NUMBER = re.compile(
    rf"(?P<before>[^\w.]*)(?P<whole>\d{{1,40}}|\d{{1,3}}(?:[, ]\d{{3}}){{1,12}})(?:\.(?P<decimals>\d{{1,40}}))?"
    rf"(?: ?{SCALE})?(?P<unit>\D*)",
    re.ASCII,
)
_DROPPED = _Dropped()
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def stated(statement: Statement) -> str | None:
    """The answer in words that a statement is; None for a remark, or an echo of the placeholder."""
    text = statement.text.strip(EDGES)
    within = opened(text)
    if within is not None and _ENDS.match(within[1]) and not _are_several(text):
        return _answer(within[0])
    return announced(statement) if not is_remark(statement) else None


def mentioned(statement: Statement) -> str | None:
    """The line behind any "answer is" but a remark."""
    return None if is_remark(statement) else remarked(statement)


def announced(statement: Statement) -> str | None:
    """An answer that begins like a remark: "in 1998", "Final Fantasy VII"."""
    return remarked(statement) if statement.announced else None


def remarked(statement: Statement) -> str | None:
    return _answer(statement.text if statement.enclosed else alone(statement.text))


def normalise(text: str) -> str:
    """Case, width, composition, punctuation of any script, articles and surplus white space are left out.

    SQuAD's convention for every script: texts that look the same are the same.
    """
    text = unicodedata.normalize("NFKC", text.translate(_ACCENTS)).casefold()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).translate(_DROPPED))
    return " ".join(_ARTICLES.sub(" ", text).split())


def seen(text: str) -> str:
    """What a reader sees in a text: case, width, blanks, an article before it, styles of quotes and dashes, and what
    ends it make no difference; other signs do, since -5 is not 5, and C++ not C. A number is written out: it may have
    zeros for decimals, and words of scale.
    """
    text = unicodedata.normalize("NFKC", _RAISED.sub("^", text.translate(_ACCENTS))).casefold()
    text = " ".join(text.translate(_STYLES).split()).strip("'").rstrip(" .,;:'")
    text = text.removeprefix("the ").removeprefix("an ").removeprefix("a ")
    return _LOOSE.sub("", _written_out(number) if (number := _NUMBER.fullmatch(text)) else text)


def _written_out(number: re.Match[str]) -> str:
    """$5.50 million as $5500000."""
    whole, decimals = re.sub("[, ]", "", number["whole"]), number["decimals"] or ""
    if scale := number["scale"]:
        decimals = decimals.ljust(ZEROS[scale], "0")
        whole, decimals = str(int(whole + decimals[: ZEROS[scale]])), decimals[ZEROS[scale] :]
    point = f".{decimals}" if decimals.strip("0") else ""
    return f"{number['before']}{whole}{point}{number['unit']}"


def _are_several(text: str) -> bool:
    """Whether a text is nothing but names, each in the same brackets or quotes: "Alien" and "Brazil"."""
    mark = text[:1]
    for place in range(_NAMES):
        within = opened(text)
        if within is None or text[0] != mark or (place and _ASIDE.match(text[: -len(within[1]) or None])):
            return False
        link = _AND.match(within[1])
        if link is None:
            return place > 0 and not within[1].strip(" .,;:!*_")
        text = within[1][link.end() :]
    return False


def _answer(text: str) -> str | None:
    """The words themselves: no dress, brackets, quotes or full stop around them."""
    text = plain(text) if "\\" in text or "</" in text else text
    text = text[:_LONGEST].strip(EDGES).rstrip(". *_")
    while (within := opened(text)) is not None and not within[1].strip(" .,;:!*_"):
        text = within[0].strip(EDGES)
    if len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1].strip(EDGES)
    return None if normalise(text) in _PLACEHOLDERS else text
