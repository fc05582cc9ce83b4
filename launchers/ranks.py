"""Starts the ranks of a run on this machine, and ends with them.

    python -P -m launchers.ranks COUNT ARGUMENTS…  # Python's, of each rank: -m spell_megatron.tools.cli resume RUN

A rank learns its number as under torchrun (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE), and whom to meet. Nothing
listens here: rank 0 takes a free port of loopback for its store and tells the others through a pipe, so that no two
starters meet, and nobody who lacks the secret in the ranks' environment is believed.

Rank 0 has the terminal. What the others write comes to standard error, each line with its rank. A signal goes to every
rank once; a Ctrl-C, too, since each has a session of its own. Where one fails the others are ended, and its exit code
is the starter's. The kernel kills ranks whose starter was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from threading import Thread
from types import FrameType
from typing import IO

from spell_megatron.base.secret import PORT_PIPE, RANKS_SECRET, new_secret
from spell_megatron.base.terminal import tidy
from spell_megatron.rollout.guard import dies_with
from spell_megatron.run.preemption import Preempted

GRACE_SECONDS = 10
"""Between TERM and KILL, for ranks that outlive one that failed."""
_PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_LINE_CHARACTERS = 1 << 16


def main(count: int, arguments: list[str]) -> int:
    """Run so many ranks to their end; the exit code of the first that failed."""
    reading, writing = os.pipe()
    secret, running = new_secret(), {}
    for rank in range(count):
        process = _start(rank, count, arguments, secret, reading if rank else writing)
        running[process.pid] = rank, process
    os.close(reading)
    os.close(writing)

    def send(number: int, frame: FrameType | None = None) -> None:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in (getattr(signal, name) for name in _PASSED_ON):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
            signal.signal(number, send)
    signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))
    relays = [
        _relay(rank, process.stdout) for rank, process in running.values() if process.stdout is not None
    ]
    left, failed = 0, 0
    while running:
        pid, status = os.wait()
        rank, process = running.pop(pid)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        if code == Preempted.exit_code:  # its state is saved; the others end in their time
            left = code
        elif code and not failed:
            failed = code
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            others = "; the others are ended" if running else ""
            with contextlib.suppress(OSError):  # the terminal is gone
                sys.stderr.write(f"rank {rank} of {count} ended {how}{others}\n")
            send(signal.SIGTERM)
            signal.alarm(GRACE_SECONDS)
    for relay in relays:
        relay.join(1.0)  # a child of a rank may still hold its end
    code = failed or left
    return code if code >= 0 else 128 - code


def _start(rank: int, count: int, arguments: list[str], secret: str, pipe: int) -> subprocess.Popen[str]:
    starter = os.getpid()
    told = {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        PORT_PIPE: str(pipe),
        RANKS_SECRET: secret,
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if rank else None,
        stderr=subprocess.STDOUT if rank else None,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=(pipe,),
        preexec_fn=lambda: dies_with(starter, signal.SIGKILL),  # this process has one thread
        env={"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count)), **os.environ, **told},
    )


def _relay(rank: int, output: IO[str]) -> Thread:
    """Copies what a rank writes, line by line, for as long as it does."""

    def copy() -> None:
        while text := output.readline(_LINE_CHARACTERS):
            with contextlib.suppress(OSError):  # nobody reads it: the rank goes on
                sys.stderr.write(f"{rank}: {tidy(text.rstrip(chr(10)))}\n")

    thread = Thread(target=copy, name=f"rank {rank}", daemon=True)
    thread.start()
    return thread


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
