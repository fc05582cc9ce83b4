"""One process in one run folder.

The lock is a file that is made with O_CREAT | O_EXCL, which NFS does in one act, and touched as long as its holder
lives. It is taken over where its holder is gone: on the same machine when no such process runs any more (its start
time counts, too), on another when the file has not been touched for a while by the waiting machine's own clock. So a
killed run, and a job that comes back from the queue on other nodes, goes on by itself. flock and fcntl locks are not
used: NFS servers differ in whether they hold between machines, and forget them when they start again.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from spell_megatron.run.record.folder import RunLockedError, enter, leave, replace_text, writing
from spell_megatron.types import SpellError

LEASE_SECONDS = 60.0
"""A holder on another machine that is not heard of for so long is gone."""
_MARGIN = 15.0
_LARGEST = 4096
_UNTOUCHED = "refresh-failed"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who is at work in a run folder."""

    host: str
    pid: int
    since: str
    job: str = ""
    """The job of SLURM, where it runs in one."""
    processes: int = 0
    """Number of the process namespace: in another one the pid means nothing."""

    @classmethod
    def here(cls) -> Holder:
        job, processes = os.environ.get("SLURM_JOB_ID", ""), 0
        with suppress(OSError):
            processes = os.stat("/proc/self/ns/pid").st_ino
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), now, job, processes)

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        try:
            with path.open(encoding="utf-8") as file:
                return cls(**json.loads(file.read(_LARGEST)))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def near(self, other: Holder) -> bool:
        """Whether one can tell if the other still runs."""
        return (self.host, self.processes) == (other.host, other.processes)

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class RunLock:
    """A lock that is held. `lost` says how it was lost, if it was; `on_loss` is told, from a thread of its own."""

    def __init__(self, run: Path, on_loss: Callable[[], object]) -> None:
        self._run, self._on_loss = run, on_loss
        self._lost: SpellError | None = None

    def lost(self) -> SpellError | None:
        return self._lost

    def lose(self, how: LeaseCompromise) -> None:
        said = (
            f"the lock of {self._run} is lost ({how.reason}): another process may have gone on with this run;"
            " no more records, checkpoints or models are written by this one"
        )
        # Where it could not be touched for a while, another attempt may well go on.
        self._lost = SpellError(said) if how.reason == _UNTOUCHED else RunLockedError(said)
        leave(self._run, self._lost)
        self._on_loss()


@contextmanager
def locked(run: Path, on_loss: Callable[[], object] = lambda: None) -> Iterator[RunLock]:
    """Be the one process in a run folder until the block ends.

    Raises RunLockedError, which names the holder, where another process is. Where the lock is lost later, whatever is
    to be written in the folder raises it.
    """
    held, me, name = RunLock(run, on_loss), Holder.here(), run / "LOCK.json"
    lease = SoftFileLease(
        run / "LOCK", lease_duration=LEASE_SECONDS, on_compromise=held.lose, thread_local=False
    )
    enter(run)
    with writing(run / "LOCK"):
        try:
            lease.acquire(timeout=0)
        except (Timeout, LeaseSettingsMismatch):
            holder = Holder.read(name)
            if holder is not None and holder.near(me):
                raise _busy(run, holder) from None
            try:
                lease.acquire(timeout=LEASE_SECONDS + _MARGIN)
            except (Timeout, LeaseSettingsMismatch):
                raise _busy(run, Holder.read(name)) from None
    try:
        replace_text(name, json.dumps(asdict(me)) + "\n")
        yield held
    finally:
        if not held.lost():
            with suppress(OSError):
                name.unlink(missing_ok=True)
        with suppress(OSError):
            lease.release()


def _busy(run: Path, holder: Holder | None) -> RunLockedError:
    who = str(holder) if holder else "another process"
    return RunLockedError(
        f"{who} is at work in {run}: wait until it ends, or end it; nothing was changed here"
    )
