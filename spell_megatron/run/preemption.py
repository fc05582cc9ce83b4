"""A run that is asked to stop saves itself and goes on later: time limits, preemption, a plain `kill`.

SLURM sends USR1 some minutes before the time limit, and TERM where another job takes the nodes. Neither may
kill a run: USR1 is blocked and waited for by a thread of its own, so that it interrupts nothing, is never
missed in a long call into C++, and leaves child processes (which inherit the mask) alone. TERM is caught
instead: children have to obey it. So is HUP, by which a terminal that is closed ends what runs in it. The loop
asks where it can leave a step; `race` leaves self-play at once, and what is measured.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from spell_megatron.types import SpellError

REQUEUE = "requeue"
"""File of a run folder: the run has saved itself because it was asked to. The batch script looks for it."""

Result = TypeVar("Result")


def attempt() -> str:
    """Names this attempt at a run: a job that was requeued is another one, under the same number."""
    return f"{os.environ.get('SLURM_JOB_ID', 'here')}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"


class Preempted(SpellError):
    """The run stopped because it was asked to. Its state is saved."""

    exit_code = 75  # EX_TEMPFAIL: nothing is wrong, but the run is not done


class Stop:
    """Whether, and by which signal, this process was asked to stop. Use `listen`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._signal = ""
        self._wakes: dict[object, Callable[[], object]] = {}
        """Of everything that races with a stop: a play, and what is measured beside it."""

    @property
    def asked(self) -> str:
        """Name of the signal that asked; empty where none did."""
        return self._signal

    def ask(self, name: str) -> None:
        """Ask to stop, as a signal does. From any thread."""
        with self._lock:
            self._signal = self._signal or name
            wakes = list(self._wakes.values())
        for wake in wakes:
            wake()

    async def race(self, work: Coroutine[Any, Any, Result]) -> Result | None:
        """The result of `work`; None where a stop is asked before it is there, which cancels it."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        with self._lock:
            self._wakes[task] = lambda: loop.call_soon_threadsafe(task.cancel)
            asked = self._signal
        if asked:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if not self._signal:
                raise
            return None
        finally:
            with self._lock:
                del self._wakes[task]


_stop: Stop | None = None


def listen() -> Stop:
    """This process' `Stop`. Call it on the main thread, and before torch: its threads inherit the mask."""
    global _stop
    if _stop is None:
        _stop = stop = Stop()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        threading.Thread(target=_wait_for_usr1, args=(stop,), name="signals", daemon=True).start()

        def terminated(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_DFL)  # a second one means it
            stop.ask(signal.Signals(number).name)

        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, terminated)
    return _stop


def preempted(run: Path, step: int, stop: Stop) -> Preempted:
    """Mark a saved run for the batch script; the error to raise. For one rank to call, after the commit."""
    (run / REQUEUE).touch()
    return Preempted(
        f"stopped on {stop.asked or 'request'} after step {step}; everything is saved:"
        f" `spell-megatron resume {run}` goes on"
    )


def _wait_for_usr1(stop: Stop) -> None:
    while True:
        signal.sigwait({signal.SIGUSR1})
        stop.ask("SIGUSR1")
