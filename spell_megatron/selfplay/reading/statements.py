"""Where a text states an answer: behind "answer is", in a box, between answer tags. The last one counts.

A statement is the text of one place. What it states is for the reader of the asked kind to say: a
later statement that holds nothing of the kind does not win over an earlier one that does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

TAIL = 32_768
"""Characters at the end of a text in which answers are looked for."""
LONGEST = 1_000
"""Characters of a statement."""
_MOST = 64
"""Statements that are read, from the last one back."""

_GAP = r"[\s*_,]{1,6}"
_SENTENCE = re.compile(
    rf"(?P<announced>(?:correct|final|right){_GAP}|(?:therefore|thus|hence|so){_GAP}the{_GAP})?answer[\s*_]{{1,6}}is\b",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]?\{|<answer>", re.IGNORECASE)
_DISPLAYS = (
    "equation",
    "equation*",
    "align",
    "align*",
    "aligned",
    "gather",
    "gather*",
    "displaymath",
    "math",
)
_BOXED = "\\boxed{"
_PAIRS = {
    **{"(": ")", "[": "]", "{": "}", "\uff08": "\uff09", "\u3010": "\u3011", "\u300c": "\u300d"},
    **{"\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "\u201e": "\u201c", "\u2039": "\u203a"},
    **{'"': '"', "`": "`", "$": "$", "$$": "$$", "```": "```", "**": "**", "__": "__"},
    **{"\\(": "\\)", "\\[": "\\]", "\\boxed{": "}", "\\fbox{": "}", "<answer>": "</answer>"},
    **{f"\\begin{{{name}}}": f"\\end{{{name}}}" for name in _DISPLAYS},
}
_OPENING = re.compile(
    "|".join(re.escape(mark) for mark in sorted(_PAIRS, key=len, reverse=True)), re.IGNORECASE
)
_DENIED = re.compile(
    r"\b(?:not|isn't|neither|nor|cannot|can't|wrong|incorrect|except|instead|never|none|unclear|unlike)\b|rather than",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"(?:also |not |only |already |clearly |directly |explicitly )*(?:in|on|at|from|by|with|within|about|as follows"
    r"|based|rounded|given|found|stated|supported|derived|taken|helpful|useful|clear|correct|right|wrong|incorrect|expressed"
    r"|shown|provided|explained|obtained|calculated|computed|determined|confirmed|consistent|verified|mentioned"
    r"|contained|located|above|below|here|checked|final|complete|accurate|valid|justified|reasonable|sound|needed|required|appreciated|reported|listed"
    r"|unique|unambiguous|straightforward|simple|easy|that|because|since|to be)\b",
    re.IGNORECASE,
)
EDGES = " \t\r\n*_"
"""Blanks and emphasis, which are no part of an answer."""
_MARGIN = EDGES + ":>\u2022"
"""What may stand between "answer is" and the answer: blanks, a colon, emphasis, marks of a quote or list."""


class Statement(NamedTuple):
    """A place's text. `announced`: a box, a tag, or a sentence like the one that is asked for ("correct answer is").
    `enclosed`: a box or a tag, whose end is marked.
    """

    text: str
    announced: bool
    enclosed: bool = False


def statements(text: str) -> Iterator[Statement]:
    """Every statement of the text's tail, the last one first."""
    text = text[-TAIL:]
    places = [*_SENTENCE.finditer(text), *_BOX.finditer(text)]
    for match in sorted(places, key=re.Match.end, reverse=True)[:_MOST]:
        start = match.end()
        if match.re is _SENTENCE:
            yield Statement(_sentence(text[start : start + 2 * LONGEST]), match["announced"] is not None)
        elif match[0][-1] == "{" and (content := _braced(text, start)) is not None:
            yield Statement(content, True, enclosed=True)
        elif match[0][-1] == ">":
            content = text[start : start + LONGEST]
            content = re.split("</answer>", content, maxsplit=1, flags=re.IGNORECASE)[0]
            yield Statement(content, True, enclosed=True)


def is_remark(statement: Statement) -> bool:
    """Whether a sentence begins like a remark about an answer: "based on …", "in document 2"."""
    return not statement.enclosed and _REMARK.match(statement.text.strip(EDGES)) is not None


def opened(statement: str) -> tuple[str, str] | None:
    """What stands between the brackets, quotes or delimiters that open a statement, and what follows them."""
    match = _OPENING.match(statement)
    if match is None:
        return None
    start, closer = match.end(), _PAIRS[match[0].lower()]
    if closer in (")", "]", "}"):
        end = _closing(statement, start, statement[start - 1], closer)
    else:
        end = statement.lower().find(closer, start)
        if closer == "$" and statement[end + 1 : end + 2].isdigit():  # "$3-$5": a price
            return None
    return (statement[start:end], statement[end + len(closer) :]) if end >= start else None


def denies(statement: str) -> bool:
    """Whether a statement says what the answer is not."""
    return _DENIED.search(statement) is not None


def alone(statement: str) -> str:
    """A statement up to the next "answer is" on its line, which begins another."""
    another = _SENTENCE.search(statement)
    return statement[: another.start()] if another else statement


def last_box(text: str) -> str | None:
    """The contents of the last `\\boxed{…}`, braces balanced. Where official scorers look, too."""
    start = text.rfind(_BOXED)
    return None if start < 0 else _braced(text, start + len(_BOXED))


def _sentence(rest: str) -> str:
    """The line behind "answer is", or more lines where it opens something that ends on a later one."""
    rest = rest.lstrip(_MARGIN)
    line = rest.partition("\n")[0]
    within = opened(rest)
    if within is not None and opened(line) is None:
        shown = len(rest) - len(within[1])
        line = rest[:shown] + within[1].partition("\n")[0]
    return line[:LONGEST]


def _braced(text: str, start: int) -> str | None:
    end = _closing(text, start, "{", "}")
    return text[start:end] if end >= 0 else None


def _closing(text: str, start: int, opener: str, closer: str) -> int:
    """Where the bracket that opened before `start` is closed; -1 where it is not."""
    depth = 1
    for at in range(start, min(len(text), start + LONGEST)):
        if text[at] == opener:
            depth += 1
        elif text[at] == closer:
            depth -= 1
            if depth == 0:
                return at
    return -1
