"""Text from outside on its way to people: whatever a file is called or a model has written, it stays text.

Names, titles, answers and messages may hold what moves a cursor, turns a line around, or forges the next one of a log.
It is taken out where text leaves the program, once: `Terminal` for what is printed, `Lines` for logs, `tidy` for pages,
`label` for pictures.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any, ClassVar, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_MARGIN = "    "
_LABEL = 80
"""Characters of a name in a picture."""


def tidy(text: str) -> str:
    """The text with a mark for whatever is no character to be read. Line ends and tabs stay."""
    return _CONTROL.sub("�", text)


def line(text: str) -> str:
    """The same in one line."""
    return tidy(" ".join(text.split("\n")))


def said(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def label(text: str) -> str:
    """The same as a name in a picture, cut where it is long. matplotlib has to be told that `$` is no mathematics."""
    found = line(text)
    return found if len(found) <= _LABEL else f"{found[: _LABEL - 1]}…"


def say(text: str) -> None:
    """Print lines of text to standard output."""
    sys.stdout.write(tidy(text) + "\n")


class _Heedless:
    """A file that may be closed at its other end, or on a full disk: whoever writes goes on."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Terminal(Console):
    """A console that prints text as it stands: brackets are no markup, and only its own escapes are.

    Where nobody reads it any more it is silent: a run does not end with its terminal.
    """

    printed: ClassVar[float] = time.monotonic()
    """When any of them has last printed."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **arguments)

    @property
    def file(self) -> IO[str]:
        return cast("IO[str]", _Heedless(super().file))

    @file.setter
    def file(self, file: IO[str]) -> None:
        self._file = file

    def note(self, message: str | Text, style: str = "") -> None:
        """Print a message, whose lines are as long as they are."""
        self.print(message, style=style, soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        Terminal.printed = time.monotonic()

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else tidy(text), style, control)


class Lines(logging.Formatter):
    """A record begins a line, and further lines of it are indented: none looks like another record."""

    def format(self, record: logging.LogRecord) -> str:
        return tidy(super().format(record)).replace("\n", "\n" + _MARGIN)


def log_to_stderr(level: int) -> None:
    """Messages of a process that has no run folder to write them to."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines("%(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
