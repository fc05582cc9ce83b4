"""Silence is a fault: whatever may last says at least once a minute where it stands.

In a terminal something moves. Elsewhere, in a file or a job's log, a line is due when nothing was printed for long.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.text import Text

from spell_megatron.base.terminal import Terminal

SILENCE_SECONDS = 55.0
"""Without a terminal, a line is due when nothing was printed for so long."""
_LOOK_SECONDS = 1.0
_speakers: list[Pulse] = []
"""Those whose blocks have begun and not ended, the innermost last: it alone speaks."""


class Pulse:
    """Prints a line of `standing` whenever no `Terminal` has printed for long: on a thread, until the block ends.

    Where others have the word, `standing` is empty.
    """

    def __init__(self, standing: Callable[[], Text], terminal: Terminal) -> None:
        self._standing, self._terminal = standing, terminal
        self._end = threading.Event()

    def __enter__(self) -> Pulse:
        _speakers.append(self)
        if not self._terminal.is_terminal and not self._terminal.quiet:
            speaker = threading.Thread(target=self._speak, name="pulse", daemon=True)
            # No signal is this thread's: one that a run blocks in all of its threads would end the process here.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            speaker.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        _speakers.remove(self)

    def _speak(self) -> None:
        while not self._end.wait(min(_LOOK_SECONDS, _due() or _LOOK_SECONDS)):
            if _speakers[-1:] == [self] and not _due() and (line := self._standing()):
                self._terminal.note(line)


def _due() -> float:
    """Seconds until a line is."""
    return max(0.0, Terminal.printed + SILENCE_SECONDS - time.monotonic())


def lasting(what: Callable[[], str]) -> Callable[[], Text]:
    """A pulse's line: what is under way, and for how long since this was called."""
    began = time.monotonic()
    return lambda: Text(f"{what()} {clock(time.monotonic() - began)}")


@contextmanager
def working(what: str, terminal: Terminal | None = None) -> Iterator[None]:
    """Say that this is under way, and for how long, until the block ends."""
    terminal = terminal or Terminal(stderr=True)
    with Pulse(lasting(lambda: what), terminal):
        if terminal.is_terminal:
            with terminal.status(Text(what)):
                yield
        else:
            yield


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
