"""Starts a command and sees to it that nothing of it outlives its parent, however the parent ends.

    python -m spell_megatron.rollout.guard COMMAND…

A vLLM server is a family of processes; killing one of them leaves the others running. The guard puts the
family into a process group of its own and ends the whole group when the server exits, when the guard is told to end
(TERM, HUP), or when its standard input closes, which the kernel does even for a parent that was killed. It prints the
group's id, and exits when the last of the family has. Python's resource trackers go last: they remove the
shared memory of those who were killed.

What the family prints goes to the guard's standard error. A file there does not grow for ever: its older part is moved
to `FILE.1`, and what was before that is lost.

The guard is two processes, each of which ends the family when the other is killed. Where both are at once, the
kernel kills the server itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS, CLEANING_SECONDS = 5.0, 10.0
LOG_BYTES, LOOK_SECONDS = 32 << 20, 5.0
"""The most of a log, and how often it is looked at."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_ENDS = (signal.SIGTERM, signal.SIGHUP)
_LIBC = ctypes.CDLL(None)


def main(command: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to handle
    told, telling = os.pipe()
    outer = os.getpid()
    keeper = os.fork()
    if keeper == 0:
        os.close(told)
        os._exit(_keep(command, outer, telling))
    os.close(telling)
    _adopt()
    for number in _ENDS:
        signal.signal(number, lambda *_: _signal(keeper, signal.SIGTERM))
    status = os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1])
    group = int(os.read(told, 32) or 0)
    if status and group:  # it may have been killed, or have failed, before it could end anybody
        _end(group)
    return status if status >= 0 else 128 - status


def _keep(command: list[str], outer: int, telling: int) -> int:
    """Run the command until it ends or is to end; returns its exit code."""
    reading, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking)
    for number in _ENDS:
        signal.signal(number, lambda *_: None)  # that it came is in the pipe
    _adopt()
    dies_with(outer, signal.SIGTERM)
    keeper = os.getpid()
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=lambda: dies_with(keeper, signal.SIGKILL),  # this process has one thread
    )
    os.write(telling, str(child.pid).encode())
    os.write(sys.stdout.fileno(), f"{child.pid}\n".encode())
    with selectors.DefaultSelector() as selector:
        for descriptor in (sys.stdin.fileno(), reading, os.pidfd_open(child.pid)):
            selector.register(descriptor, selectors.EVENT_READ)
        while not selector.select(LOOK_SECONDS):
            _bound(sys.stderr.fileno())
    if child.poll() is None:
        _signal(-child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    _kill(child.pid)
    status = child.wait()
    _bury(child.pid)
    return status if status >= 0 else 128 - status


def _bound(log: int) -> None:
    """Where a log is too long, copy it aside and begin it anew. Whoever writes to it appends, and need not know."""
    with contextlib.suppress(OSError):  # a file system that is gone: the next look may find it again
        found = os.fstat(log)
        if stat.S_ISREG(found.st_mode) and found.st_size > LOG_BYTES:
            path = os.readlink(f"/proc/self/fd/{log}")
            with contextlib.suppress(OSError):  # a full disk, say: then all the more
                shutil.copyfile(path, f"{path}.1")
            os.ftruncate(log, 0)


def _adopt() -> None:
    """Orphans of the family become this process's children: it can wait for them, and bury them."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def dies_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, or raise it where that was before."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        signal.raise_signal(number)


def _end(group: int) -> None:
    _kill(group)
    _bury(group)


def _kill(group: int) -> None:
    """Kill a process group, which even a stopped process obeys. A resource tracker that has nobody left to wait for
    cleans up and ends by itself."""
    deadline = time.monotonic() + CLEANING_SECONDS
    while (members := _members(group)) and time.monotonic() < deadline:
        for process in members:
            if not _tracks(process):
                _signal(process, signal.SIGKILL)
        time.sleep(0.01)
    _signal(-group, signal.SIGKILL)


def _members(group: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                state, _, of = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:3]
                if int(of) == group and state not in (b"Z", b"X"):
                    found.append(int(entry.name))
    return found


def _tracks(process: int) -> bool:
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path("/proc", str(process), "cmdline").read_bytes()
    return False


def _signal(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _bury(group: int) -> None:
    """Wait for what was killed, but not for a process that the kernel does not let go."""
    deadline = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(ChildProcessError):  # there is none left
        while time.monotonic() < deadline:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
