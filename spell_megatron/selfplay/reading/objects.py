"""JSON objects as models write them: LaTeX in strings, trailing commas, curly or single quotes, comments.

A small reader instead of a general repairer, because a repairer guesses: it completes what was cut off and
finds objects where none were meant, and the questioner would be paid for them. This one mends spellings
that have one meaning, and refuses everything else. It reads each character once, to a bounded depth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spell_megatron.selfplay.reading import words

TAIL = 32_768
"""Characters at the end of a text in which objects are looked for."""
_ATTEMPTS = 64
"""Opening braces at which an object is tried, from the last one back."""
_STEPS = 100_000
"""Pieces of strings that are read in one text, over all attempts."""
_DEEPEST = 8
_LONGEST_NUMBER = 300

_START = re.compile(r"\{(?=\s*(?:[\"'\u2018\u201c\u201d\u201e\u00ab\uff02}/#]|[A-Za-z_]\w{0,40}\s*:))")
_BLANK = re.compile(r"(?:\s+|//[^\n]*|#[^\n]*|/\*(?:[^*]|\*(?!/))*\*/)+")
_BARE_NAME = re.compile(r"[A-Za-z_]\w*")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])")
_CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}

_QUOTES = {
    **{'"': '"\uff02', "'": "'", "\uff02": '"\uff02', "\u00ab": "\u00bb", "\u2018": "\u2019\u2018"},
    **{"\u201c": "\u201d\u201c\u201f", "\u201d": "\u201d\u201c", "\u201e": "\u201c\u201d\u201f"},
}
"""What closes a string, by what opened it."""
_CLOSED = re.compile(r"\s*[,:}\]/#]")
"""What follows the quotation mark that closes a string. Any other one is part of it."""
_PLAIN = re.compile(r"[^\\\"'\uff02\u00bb\u2018\u2019\u201c\u201d\u201f]+")
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|([A-Za-z]+)|(.)|$)", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_LATEX = words(
    "nu neq ne nabla not notin neg nmid nless ngtr nleq ngeq natural nearrow nwarrow nonumber newline normalsize num"
    " nolimits rho right rangle rceil rfloor rm rightarrow rightleftharpoons rvert rVert ref root rule rbrace rbrack"
    " text textbf textit textrm texttt textsf textsc textup textcolor textstyle theta times tau tan tanh tfrac tbinom"
    " to top triangle triangleq tilde therefore tag thinspace tt tiny thicksim thickapprox textdollar"
)
"""Commands that begin like the JSON escapes of a line break, a carriage return or a tab."""


class UnreadableObject(ValueError):
    """Not an object in any spelling that is read here."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object and where it stands in its text: `text[start:end]`."""

    value: dict[str, Any]
    start: int
    end: int


def objects(text: str) -> Iterator[Found]:
    """The objects in the text's tail, inner ones too, the last opened first."""
    offset = max(0, len(text) - TAIL)
    tail = text[offset:]
    places = [match.start() for match in _START.finditer(tail)]
    reader = _Reader(tail)
    for start in reversed(places[-_ATTEMPTS:]):
        try:
            value, end = reader.object(start + 1, 1)
        except UnreadableObject:
            continue
        yield Found(value, offset + start, offset + end)


def last_object(text: str, name: str) -> Found | None:
    """The last object with a text of that name; of such objects within each other the outermost."""
    found: Found | None = None
    for candidate in objects(text):
        if isinstance(candidate.value.get(name), str) and (found is None or candidate.end >= found.end):
            found = candidate
    return found


class _Reader:
    """Recursive descent: each method reads one thing at `at` and returns it with the place behind it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = _STEPS

    def object(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        fields: dict[str, Any] = {}
        at = self._blank(at)
        while not self._is("}", at):
            name, at = self._name(at)
            at = self._blank(self._expect(":", self._blank(at)))
            fields[name.strip()], at = self._value(at, depth)
            at = self._separated("}", at)
        return fields, at + 1

    def _list(self, at: int, depth: int) -> tuple[list[Any], int]:
        entries: list[Any] = []
        at = self._blank(at)
        while not self._is("]", at):
            entry, at = self._value(at, depth)
            entries.append(entry)
            at = self._separated("]", at)
        return entries, at + 1

    def _separated(self, closer: str, at: int) -> int:
        """Past one comma, which may stand in front of the closing bracket, too."""
        at = self._blank(at)
        return at if self._is(closer, at) else self._blank(self._expect(",", at))

    def _value(self, at: int, depth: int) -> tuple[Any, int]:
        first = self.text[at : at + 1]
        if first in "{[" and first:
            if depth == _DEEPEST:
                raise UnreadableObject
            return self.object(at + 1, depth + 1) if first == "{" else self._list(at + 1, depth + 1)
        if first in _QUOTES:
            return self._string(at)
        if match := _NUMBER.match(self.text, at):
            return _number(match[0]), match.end()
        match = _BARE_NAME.match(self.text, at)
        if match is None or match[0] not in _CONSTANTS:
            raise UnreadableObject
        return _CONSTANTS[match[0]], match.end()

    def _name(self, at: int) -> tuple[str, int]:
        if self.text[at : at + 1] in _QUOTES:
            return self._string(at)
        match = _BARE_NAME.match(self.text, at)
        if match is None:
            raise UnreadableObject
        return match[0], match.end()

    def _string(self, at: int) -> tuple[str, int]:
        closers, at = _QUOTES[self.text[at]], at + 1
        parts: list[str] = []
        while at < len(self.text) and self.steps:
            self.steps -= 1
            if match := _PLAIN.match(self.text, at):
                parts.append(match[0])
                at = match.end()
            elif match := _ESCAPE.match(self.text, at):
                parts.append(_unescaped(match))
                at = match.end()
            elif self.text[at] in closers and _CLOSED.match(self.text, at + 1):
                return _whole("".join(parts)), at + 1
            else:
                parts.append(self.text[at])
                at += 1
        raise UnreadableObject

    def _blank(self, at: int) -> int:
        """Past white space and comments."""
        match = _BLANK.match(self.text, at)
        return match.end() if match else at

    def _expect(self, character: str, at: int) -> int:
        if not self._is(character, at):
            raise UnreadableObject
        return at + 1

    def _is(self, character: str, at: int) -> bool:
        return self.text.startswith(character, at)


def _unescaped(match: re.Match[str]) -> str:
    """The character that JSON means, or the backslash itself where it is LaTeX's."""
    code, name, character = match.groups()
    if code:
        return chr(int(code, 16))
    if not name:
        return character if character and character in "\"'\\/" else match[0]
    if name[0] in "bf" or name in _LATEX or name[0] not in _ESCAPED:
        return match[0]
    return _ESCAPED[name[0]] + name[1:]


def _whole(text: str) -> str:
    """Halves of characters (`\\ud83d\\ude00`) joined; a half alone becomes the replacement character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _number(text: str) -> int | float:
    if len(text) > _LONGEST_NUMBER:
        raise UnreadableObject
    value = int(text) if text.lstrip("+-").isdigit() else float(text)
    if not math.isfinite(value):
        raise UnreadableObject
    return value
