"""Being asked to stop: signals are kept, self-play is left at once, children live on."""

from __future__ import annotations

import asyncio
import signal
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
for _ in range({looks}):
    if stop.asked:
        break
    time.sleep(0.01)
print(stop.asked, child.wait(), flush=True)
"""


def _run(name: str, ways: signal.Handlers = signal.SIG_DFL) -> list[str]:
    """What the program says; where it is started, the signal is heeded or (as by nohup) ignored."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(name=name, looks=6000 if ways is signal.SIG_DFL else 10)],
        capture_output=True,
        text=True,
        timeout=180,
        preexec_fn=lambda: signal.signal(signal.Signals[name], ways),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_usr1_is_kept_and_spares_children() -> None:
    assert _run("SIGUSR1") == ["alive", "SIGUSR1", "0"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_may_end_a_run_is_kept_and_ends_children(name: str) -> None:
    assert _run(name) == [name, f"{-signal.Signals[name]}"]


def test_a_run_that_is_to_outlive_its_terminal_does() -> None:
    assert _run("SIGHUP", signal.SIG_IGN) == ["alive", "0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_leaves_nothing_in_temporary_folders(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = (
        "import time; from tempfile import TemporaryDirectory; from spell_megatron.tools import cli\n"
        "def app():\n"
        f"    with TemporaryDirectory(dir={str(tmp_path)!r}):\n"
        "        print('ready', flush=True); time.sleep(600)\n"
        "cli.app = app; cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    process.communicate(timeout=180)
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


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
