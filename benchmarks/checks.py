"""Checks that go on whatever becomes of one of them: a row each, in a process a part, with a time limit.

What is checked may hang, run out of memory or take its process along; the rows that were made by then stand, and the
next part begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from threading import Timer
from typing import Any

from rich.table import Table

from spell_megatron.base.interpreter import environment

Figures = dict[str, Any]
Check = tuple[str, Callable[[], Figures]]
"""A name, and what measures: it returns figures, and raises where the check fails."""

_TAIL = 2000
"""Bytes of a process' log that are shown where it ended badly."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a check."""

    check: str
    seconds: float
    fault: str = ""
    figures: Figures = field(default_factory=dict)


def report(checks: Iterable[Check]) -> None:
    """Make the checks one after another, in this process; a fault of one is its row's. Rows go to standard output."""
    for name, check in checks:
        sys.stdout.write(json.dumps(asdict(made(name, check))) + "\n")
        sys.stdout.flush()


def made(name: str, check: Callable[[], Figures]) -> Row:
    """What becomes of one check; whatever it raises is its fault."""
    began, fault, figures = time.monotonic(), "", {}
    try:
        figures = check()
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return Row(name, time.monotonic() - began, fault, figures)


def table(rows: Sequence[Row], title: str) -> Table:
    """For a terminal."""
    shown = Table("check", "", "seconds", "figures", title=title)
    for row in rows:
        shown.add_row(row.check, "failed" if row.fault else "ok", f"{row.seconds:.1f}", _figures(row))
    return shown


def markdown(rows: Sequence[Row]) -> list[str]:
    """For a page: the table's lines, and the faults in full."""
    lines = [
        "| check | | seconds | figures |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row.check} | {'failed' if row.fault else 'ok'} | {row.seconds:.1f} | {_figures(row)} |"
            for row in rows
        ),
    ]
    return lines + [f"\n{row.check}:\n\n```\n{row.fault}\n```" for row in rows if row.fault]


def _figures(row: Row) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.figures.items()
    )


def follow(command: Sequence[str], name: str, limit: float) -> Iterator[Row]:
    """The rows of a command that reports, as they come; one more where it did not end well within `limit` seconds."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=environment(),  # where benchmarks are found, whatever folder this is
        )
        # Servers have sessions of their own; they end with the process that started them.
        timer = Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError, TypeError):  # a library's own words
                yield Row(**json.loads(line))
        code = process.wait()
        timer.cancel()
        if code:
            seconds = time.monotonic() - began
            log.seek(0)
            tail = log.read()[-_TAIL:].decode(errors="replace")
            why = "was not through in time" if seconds >= limit else f"ended with code {code}"
            yield Row(f"the rest of {name}", seconds, f"{why}\n{tail}")
