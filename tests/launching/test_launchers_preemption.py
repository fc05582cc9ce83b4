"""Being asked to stop: signals are kept, self-play is left at once, children live on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from spell_megatron.run.preemption import REQUEUE, Stop, preempted

pytestmark = pytest.mark.unit

_PROGRAM = """
import os, signal, subprocess, sys, time
from spell_megatron.run.preemption import listen
stop = listen()
assert listen() is stop and not stop.asked
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3); print('alive', flush=True)"])
for process in (child.pid, os.getpid()):
    os.kill(process, signal.{name})
for _ in range(500):
    if stop.asked:
        break
    time.sleep(0.01)
print(stop.asked, child.wait(), flush=True)
"""


def _run(name: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(name=name)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_usr1_is_kept_and_spares_children() -> None:
    assert _run("SIGUSR1") == ["alive", "SIGUSR1", "0"]


def test_term_is_kept_and_ends_children() -> None:
    assert _run("SIGTERM") == ["SIGTERM", "-15"]


def test_work_that_nobody_stops_gives_its_result() -> None:
    assert asyncio.run(Stop().race(asyncio.sleep(0, "done"))) == "done"


def test_a_stop_cancels_the_work_at_once() -> None:
    stop, cleaned = Stop(), []

    async def work() -> str:
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.append(True)
        return "done"

    async def both() -> str | None:
        asyncio.get_running_loop().call_later(0.01, stop.ask, "SIGUSR1")
        return await stop.race(work())

    assert asyncio.run(both()) is None
    assert cleaned
    assert stop.asked == "SIGUSR1"


def test_a_stop_before_the_work_leaves_it_undone() -> None:
    stop = Stop()
    stop.ask("SIGTERM")
    assert asyncio.run(stop.race(asyncio.sleep(0, "done"))) is None


def test_other_cancellations_and_faults_pass() -> None:
    async def fault() -> None:
        raise KeyError("x")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(KeyError):
        asyncio.run(Stop().race(fault()))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Stop().race(cancelled()))


def test_a_saved_run_is_marked_and_says_how_it_goes_on(tmp_path: Path) -> None:
    stop = Stop()
    stop.ask("SIGUSR1")
    error = preempted(tmp_path, 4, stop)
    assert (tmp_path / REQUEUE).exists()
    assert f"resume {tmp_path}" in str(error)
    assert "after step 4" in str(error)
    assert error.exit_code not in (0, 1, 2)
