"""Where a run's log messages go: all into its folder, warnings also above the live bar."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler

from rich.text import Text

from spell_megatron.base.terminal import Lines, Terminal
from spell_megatron.run.record.folder import RunFolder, writing

_LOG_BYTES = 32 << 20
"""Bytes of the run's log, and of its older part in `run.log.1`."""
_REMEMBERED = 1000
"""Warnings that are not printed again."""


class _LogFile(RotatingFileHandler):
    """A log that cannot be written does not stop a run: its metrics will, with a message."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Warnings(logging.Handler):
    """Warnings on the terminal: each once, on one line however long it is."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal, self._said = terminal, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
        except Exception:  # of a library's own message; it is in the file, with what is wrong
            return
        if message not in self._said:
            if len(self._said) >= _REMEMBERED:
                self._said.clear()
            self._said.add(message)
            line = Text.assemble((record.levelname, "yellow"), " ", message)
            self._terminal.note(line)


@contextmanager
def logging_to(run: RunFolder, terminal: Terminal) -> Iterator[None]:
    """Send messages to `run.log` (from INFO on) and to `terminal` (from WARNING on) until the block ends.

    Handlers that were there before rest meanwhile: they would write across the live bar.
    """
    with writing(run.log):
        file = _LogFile(run.log, encoding="utf-8", maxBytes=_LOG_BYTES, backupCount=1)
    file.setFormatter(Lines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown = _Warnings(terminal)
    root, ours = logging.getLogger(), logging.getLogger("spell_megatron")
    handlers, level = root.handlers[:], ours.level
    root.handlers = [file, shown]
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers = handlers
        ours.setLevel(level)
        file.close()
