"""Silence is a fault: whatever may last says at least once a minute where it stands.

In a terminal something moves. Elsewhere, in a file or a job's log, a line is due when nothing was printed for long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.text import Text

from spell_megatron.terminal import Terminal

SILENCE_SECONDS = 55.0
"""Without a terminal, a line is due when nothing was printed for so long."""


class Pulse:
    """Prints lines, and one of `standing` whenever there was none for long: on a thread, until the block ends."""

    def __init__(self, standing: Callable[[], Text], terminal: Terminal) -> None:
        self._standing, self._terminal = standing, terminal
        self._printed = time.monotonic()
        self._end = threading.Event()
        self._speaker = threading.Thread(target=self._speak, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        if not self._terminal.is_terminal and not self._terminal.quiet:
            self._speaker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def print(self, line: Text) -> None:
        self._printed = time.monotonic()
        self._terminal.note(line)

    def _speak(self) -> None:
        while not self._end.wait(max(0.0, self._printed + SILENCE_SECONDS - time.monotonic())):
            if time.monotonic() - self._printed >= SILENCE_SECONDS:
                self.print(self._standing())


@contextmanager
def working(what: str, terminal: Terminal | None = None) -> Iterator[None]:
    """Say that this is under way, and for how long, until the block ends."""
    terminal, began = terminal or Terminal(stderr=True), time.monotonic()

    def standing() -> Text:
        return Text(f"{what} {clock(time.monotonic() - began)}")

    with Pulse(standing, terminal):
        if terminal.is_terminal:
            with terminal.status(Text(what)):
                yield
        else:
            yield


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
