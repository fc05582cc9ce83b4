"""The starter of ranks: signals, faults and ends of its ranks are its own, and nothing of it listens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from spell_megatron.base.interpreter import python
from spell_megatron.base.rendezvous import LOOPBACK
from spell_megatron.run.preemption import Preempted

PATIENCE = 180.0
WAIT = """
import os, signal, sys, time
from pathlib import Path
rank, folder = os.environ["RANK"], Path(sys.argv[1])
got = []
def note(number, frame):
    got.append(signal.Signals(number).name)
    (folder / f"{rank}.{len(got)}").touch()
for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2"):
    signal.signal(getattr(signal, "SIG" + name), note)
(folder / f"{rank}.tmp").write_text(str(os.getpid()))
(folder / f"{rank}.tmp").rename(folder / rank)
"""
MEET = """
import json, os, psutil, sys, time
import torch.distributed as dist
from pathlib import Path
from spell_megatron.base import rendezvous
rendezvous.join("gloo", "", 60.0)
rank, folder = dist.get_rank(), Path(sys.argv[1])
told = [None, None]
dist.all_gather_object(told, sys.argv[1])
assert told == [sys.argv[1]] * 2
heard = [[c.laddr.ip for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
         for p in (psutil.Process(), psutil.Process(os.getppid()))]
(folder / f"{rank}.json").write_text(json.dumps(heard))
dist.barrier()
dist.destroy_process_group()  # a process that ends with threads of its group may abort
"""


@contextmanager
def starter(code: str, folder: Path, count: int = 2) -> Iterator[subprocess.Popen[str]]:
    """A starter in a session of its own, whose ranks run `code` with the folder's path."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        python("launchers.ranks", str(count), "-c", code, str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _heed() -> None:
    """Signals that the background job of a script ignores, and hands down so."""
    for name in ("SIGINT", "SIGQUIT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def started(folder: Path, count: int = 2) -> list[psutil.Process]:
    """The ranks, once they are ready."""
    until(lambda: all((folder / str(rank)).exists() for rank in range(count)))
    return [psutil.Process(int((folder / str(rank)).read_text())) for rank in range(count)]


def until(true: object) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.unit
def test_ranks_are_told_who_they_are_and_rank_0_has_the_terminal(tmp_path: Path) -> None:
    code = """
import os, sys
print(*(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")))
sys.stderr.write("a \\x1b[2J word")
"""
    with starter(code, tmp_path, 3) as process:
        out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, f"0 0 3 3 {LOOPBACK}\n")
    for rank in (1, 2):
        assert f"{rank}: {rank} {rank} 3 3 {LOOPBACK}\n" in errors
        assert f"{rank}: a �[2J word\n" in errors


@pytest.mark.unit
@pytest.mark.parametrize(
    ("end", "code", "how"),
    [("sys.exit(3)", 3, "with exit code 3"), ("os.kill(os.getpid(), 9)", 137, "by SIGKILL")],
)
def test_where_a_rank_fails_the_others_end_however_busy(
    tmp_path: Path, end: str, code: int, how: str
) -> None:
    """Rank 0 takes no heed of TERM; the grace is shortened."""
    program = f"""{WAIT}
while not (folder / "0").exists():
    time.sleep(0.01)
if rank == "1":
    {end}
time.sleep(600)
"""
    runner = (
        "import sys; from launchers import ranks; ranks.GRACE_SECONDS = 1;"
        "sys.exit(ranks.main(2, ['-c', *sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner, program, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code
    assert done.stderr == f"rank 1 of 2 ended {how}; the others are ended\n"
    assert not psutil.pid_exists(int((tmp_path / "0").read_text()))


@pytest.mark.unit
def test_every_rank_gets_every_signal_once(tmp_path: Path) -> None:
    """A Ctrl-C as well, which the terminal sends to the whole group."""
    names = ["SIGUSR1", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR2", "SIGINT"]
    program = f"{WAIT}\nwhile len(got) < 6:\n    time.sleep(0.01)\ntime.sleep(0.2)\nprint(*got)\n"
    with starter(program, tmp_path) as process:
        assert all(os.getsid(rank.pid) == rank.pid for rank in started(tmp_path)), "a Ctrl-C comes twice"
        for number, name in enumerate(names[:-1], start=1):
            process.send_signal(signal.Signals[name])  # of two at once the lower number would come first
            until(lambda: all((tmp_path / f"{rank}.{number}").exists() for rank in range(2)))  # noqa: B023
        os.killpg(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=PATIENCE)
    assert out.split() == names
    assert errors == f"1: {' '.join(names)}\n"


@pytest.mark.unit
def test_ranks_that_leave_on_request_have_their_time(tmp_path: Path) -> None:
    program = f"""{WAIT}
while not got:
    time.sleep(0.01)
if rank == "0":
    time.sleep(1)
    (folder / "saved").touch()
sys.exit({Preempted.exit_code})
"""
    with starter(program, tmp_path) as process:
        started(tmp_path)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (Preempted.exit_code, "")
    assert (tmp_path / "saved").exists()


@pytest.mark.unit
def test_no_rank_outlives_a_killed_starter(tmp_path: Path) -> None:
    with starter(f"{WAIT}\ntime.sleep(600)\n", tmp_path) as process:
        ranks = started(tmp_path)
        process.kill()
        gone, left = psutil.wait_procs(ranks, timeout=PATIENCE / 2)
        for rank in left:
            rank.kill()
    assert len(gone) == 2


@pytest.mark.distributed
def test_two_worlds_on_one_machine_meet_each_its_own_and_listen_on_loopback_alone(tmp_path: Path) -> None:
    with starter(MEET, tmp_path / "a") as one, starter(MEET, tmp_path / "b") as two:
        for process in (one, two):
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors
    for file in [tmp_path / world / f"{rank}.json" for world in "ab" for rank in range(2)]:
        rank, started_by = json.loads(file.read_text())
        assert set(rank) == {LOOPBACK}
        assert not started_by
