"""Starts a command and sees to it that nothing of it outlives its parent, however the parent ends.

    python -m spell_megatron.rollout.guard COMMAND…

A vLLM server is a family of processes; killing one of them leaves the others running. The guard puts the
family into a process group of its own and ends the whole group when either the server exits or the guard's
standard input closes, which the kernel does even for a parent that was killed. It prints the group's id, and
exits when the last of the family has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(command: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to handle
    # Orphans of the family become the guard's children: it can wait for them, and bury them.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    os.write(sys.stdout.fileno(), f"{child.pid}\n".encode())
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        selector.register(os.pidfd_open(child.pid), selectors.EVENT_READ)
        selector.select()
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # a stopped process obeys only this
        os.killpg(child.pid, signal.SIGKILL)
    status = child.wait()
    _bury(child.pid)
    return status


def _bury(group: int) -> None:
    """Wait for what was killed, but not for a process that the kernel does not let go."""
    deadline = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(ChildProcessError):  # there is none left
        while time.monotonic() < deadline:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
