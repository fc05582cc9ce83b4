"""What a source gives: texts, and an account of what was left out."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

logger = logging.getLogger(__name__)

PART = 1 << 20
"""Characters of a text that are in one piece; a longer one comes in parts, so that no text is a burden to memory."""
SHOWN = 3
"""Files of each kind of fault that are named in the log; the others are counted."""
_NAME = 400
"""Characters that are kept of a name or a title."""
_BREAKS = ("\n\n", "\n", " ")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]+")


@dataclass(frozen=True, slots=True)
class Text:
    """A text as its source gives it. `cluster` is its given group: folder, id or file. `asks`: it may be a question, as
    far as can be told from where in its row it stands."""

    name: str
    text: str
    cluster: str
    title: str = ""
    asks: bool = True

    def plain(self) -> Text:
        """With a name, a cluster and a title that can be stored and shown: one line of Unicode each.

        File names need not be Unicode, and JSON can spell half a character.
        """
        return replace(self, name=plain(self.name), cluster=plain(self.cluster), title=plain(self.title))

    def parts(self) -> Iterator[Text]:
        """Itself, or parts of at most `PART` characters that end with a paragraph, a line or a word."""
        if len(self.text) <= PART:
            yield self
            return
        start, number = 0, 1
        while start < len(self.text):
            end = start + PART if len(self.text) - start <= PART else cut(self.text, start + 1, start + PART)
            yield replace(self, name=f"{self.name}#part{number}", text=self.text[start:end])
            start, number = end, number + 1


def cut(text: str, low: int, end: int, marks: Sequence[str] = _BREAKS) -> int:
    """Where to cut `text`: behind the last of the first mark that stands between `low` and `end`, else at `end`.

    By default a paragraph, a line or a word is whole.
    """
    return next((at + len(mark) for mark in marks if (at := text.rfind(mark, low, end)) >= 0), end)


def plain(name: str) -> str:
    """One line of Unicode, of bounded length; what is neither shows as an escape, so that names stay apart."""
    text = name[:_NAME].encode("utf-8", "backslashreplace").decode("utf-8")
    return _UNPRINTABLE.sub(" ", text).strip()


@dataclass
class Skipped:
    """What was left out of a corpus, and why: counted, and the first of each kind logged."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """An example of each reason."""

    def add(self, reason: str, where: str, detail: str = "", level: int = logging.WARNING) -> None:
        self.counts[reason] += 1
        message = plain(f"{where}: {reason}{f' ({detail})' if detail else ''}")
        self.first.setdefault(reason, message)
        if self.counts[reason] <= SHOWN:
            logger.log(level, "skipped %s", message)
        elif self.counts[reason] == SHOWN + 1:
            logger.log(level, "further files or rows that are %s are counted, not named", reason)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
