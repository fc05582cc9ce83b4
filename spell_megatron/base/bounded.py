"""Work on hostile input in a process of its own, which may take so much time and memory, and no more.

A regular expression, an expression of a mathematician's or a template can keep a C extension busy for ever, or ask
for all memory; nothing gentler than the end of its process helps then. The next call starts another one.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

from spell_megatron.base.interpreter import environment, python

_START_SECONDS = 300.0
"""For imports, on a machine that is busy."""
_PATIENCE, _LOOKS = 20, 4
"""Times its seconds that a call may last by the clock, and the waits that each is cut into."""


class TooMuch(Exception):
    """The work took more time or memory than it was given; the message says which."""


class WorkFailed(Exception):
    """The work raised an exception, which the message names."""


class Bounded:
    """A function that other processes would import as `module:name`, called in one of its own. Any thread may call.

    A call takes `seconds` of the processor and `memory` bytes at most, imports aside: a machine that is busy or a
    process that is suspended takes no time away. `sample` are arguments like those to come: what they import is
    imported beforehand. Arguments and results are pickled.
    """

    def __init__(
        self,
        function: str,
        *,
        seconds: float,
        memory: int,
        sample: tuple[Any, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._function, self._seconds, self._memory, self._sample = function, seconds, memory, sample
        self._environment = dict(environment or {})
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection[Any, Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The function's result. Raises TooMuch or Failed."""
        with self._lock:
            try:
                line = self._line or self._start()
                line.send(arguments)
                # In short waits: one in which this process is suspended counts no more than any other.
                if not any(line.poll(self._seconds / _LOOKS) for _ in range(_PATIENCE * _LOOKS)):
                    raise TooMuch(f"it took longer than {_PATIENCE * self._seconds:g} s, mostly idle")
                fault, answer = line.recv()
            except (OSError, EOFError):
                if self._stop() == -signal.SIGPROF:
                    raise TooMuch(f"it took longer than {self._seconds:g} s") from None
                raise TooMuch("its process was ended, most likely for the memory that it took") from None
            except BaseException:
                self._stop()
                raise
        if fault == MemoryError.__name__:
            raise TooMuch(f"it took more than {self._memory >> 20} MiB of memory")
        if fault:
            raise WorkFailed(f"{fault}: {answer}")
        return answer

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> Connection[Any, Any]:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                python(__name__, str(theirs.fileno()), self._function),
                pass_fds=(theirs.fileno(),),
                env={
                    **environment(),
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    **self._environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._line = ours
        ours.send((self._seconds, self._memory))
        ours.send(self._sample)
        if not ours.poll(_START_SECONDS):
            raise TooMuch(f"its process did not start in {_START_SECONDS:.0f} s")
        ours.recv()
        return ours

    def _stop(self) -> int | None:
        """End the process, unless it has ended; how it did, as `Popen.returncode`."""
        line, process, self._line, self._process = self._line, self._process, None, None
        if line is not None:
            line.close()
        if process is not None:
            process.kill()
            return process.wait()
        return None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._stop()


def _serve(descriptor: int, name: str) -> None:
    """The other process: answers one call after another, until nobody is there to ask."""
    line: Connection[Any, Any] = Connection(descriptor)
    module, _, attribute = name.partition(":")
    function = getattr(import_module(module), attribute)
    seconds, memory = line.recv()
    line.recv()  # imports what the sample needs
    limit = memory + _occupied()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    line.send("ready")
    while True:
        try:
            arguments = line.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)  # the signal ends this process
        try:
            answer = "", function(*arguments)
        except Exception as error:
            answer = type(error).__name__, str(error)[:1000]
        signal.setitimer(signal.ITIMER_PROF, 0)
        line.send(answer)


def _occupied() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        _serve(int(sys.argv[1]), sys.argv[2])
