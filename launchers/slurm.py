"""Submitting a job's file, following all its attempts, and ending as the job ended."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from launchers.job import REQUEUED, PreparedRun
from spell_megatron.base.terminal import Terminal, tidy
from spell_megatron.types import SpellError

_COMMAND_SECONDS = 120.0
_LOST_SECONDS = 600.0
"""SLURM's controller may be away for so long before a job counts as lost."""
_SLOWEST_POLL = 10.0

# Terminal states and the exit codes that stand for them where the job has none of its own.
_ENDED = {
    "COMPLETED": 0,
    "FAILED": 1,
    "CANCELLED": 130,
    "TIMEOUT": 124,
    "DEADLINE": 124,
    "OUT_OF_MEMORY": 137,
    "NODE_FAIL": 1,
    "BOOT_FAIL": 1,
    "PREEMPTED": 1,
}

# What sbatch says, and what to do about it. The first that fits is shown.
_REMEDIES = (
    ("invalid partition", "set `partition` of the profile to one that `sinfo -s` lists"),
    ("account", "set `account` of the profile to one of yours: `sacctmgr show associations user=$USER`"),
    ("qos", "set `qos` of the profile to one that `sacctmgr show qos` lists"),
    (
        "time limit",
        "lower `time` of the profile below the partition's limit (`sinfo -o '%P %l'`); runs resume",
    ),
    (
        "generic resource",
        "this cluster counts GPUs otherwise: set request_gpus: false, and ask for them in sbatch: {gres: …}; where a"
        " node has none, set gpus_per_node: 0",
    ),
    ("node count", "lower `nodes` of the profile: the partition has fewer (`sinfo -o '%P %D'`)"),
    (
        "node configuration",
        "no such nodes in the partition: compare nodes, gpus_per_node, cpus_per_rank and memory of the"
        " profile with `sinfo -o '%P %D %G %c %m'`",
    ),
    ("more processors", "lower `cpus_per_rank` or `nodes` of the profile (`sinfo -o '%P %D %c'`)"),
    ("memory", "lower `memory` of the profile (`sinfo -o '%P %m'`)"),
    ("feature", "correct `constraint` in `sbatch` of the profile (`sinfo -o '%P %f'`)"),
    ("container", "`container` needs the pyxis plugin on the cluster: install it, or give a `venv` instead"),
    ("unrecognized option", "remove that header from `sbatch` of the profile: this sbatch does not know it"),
    ("contact", "SLURM's controller does not answer: try `sinfo`, then launch again"),
)


@dataclass(frozen=True, slots=True)
class JobState:
    """A job: SLURM's word for it, the exit code it stands for (None while the job goes on), its restarts."""

    name: str
    code: int | None = None
    attempt: int = 0


def require() -> None:
    """Raise SpellError where this machine cannot submit."""
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        raise SpellError(
            "no sbatch and scontrol here: launch from a login node of the cluster, or use --dryrun and take"
            " the file that it names there"
        )


def check_accepted(file: Path) -> None:
    """Ask SLURM whether it would take the file, without submitting it. Raises SpellError with the remedy."""
    done = _slurm("sbatch", "--test-only", str(file))
    if done.returncode:
        said = " ".join(line.partition(": ")[2] or line for line in done.stderr.split("\n") if line)
        raise SpellError(f"SLURM refuses this job: {said}; {remedy(said)} (the file: {file})")


def remedy(said: str) -> str:
    """What to do about a refusal of sbatch."""
    lowered = said.lower()
    return next((what for sign, what in _REMEDIES if sign in lowered), "compare the profile with `sinfo`")


def submit(file: Path) -> str:
    """Submit and return the job's id."""
    done = _slurm("sbatch", "--parsable", str(file))
    if done.returncode:
        raise SpellError(f"sbatch failed: {done.stderr.strip()}; {remedy(done.stderr)}")
    return done.stdout.strip().partition(";")[0]


def job_state(job_id: str) -> JobState | None:
    """A job's state now; None where nobody knows it any more, or SLURM does not answer."""
    done = _slurm("scontrol", "show", "job", "--oneliner", job_id)
    if done.returncode == 0:
        attempt = int(_field(done.stdout, "Restarts") or 0)
        return _state(_field(done.stdout, "JobState"), _field(done.stdout, "ExitCode"), attempt)
    if shutil.which("sacct"):
        rows = _slurm("sacct", "-nPX", "-j", job_id, "-o", "State,ExitCode").stdout.splitlines()
        if rows:
            name, _, code = rows[-1].partition("|")
            return _state(name.partition(" ")[0], code)
    return None


def follow(job: PreparedRun, job_id: str, out: TextIO, note: Callable[[str], None]) -> JobState:
    """Copy the logs of all attempts to `out` until the job has ended; `note` gets changes of its state.

    Raises SpellError where SLURM has lost the job.
    """
    began = last_known = time.monotonic()
    shown: JobState | None = None
    with ExitStack() as stack:
        logs = _Logs(job.logs, job_id, stack)
        while True:
            state = job_state(job_id)
            logs.copy(out)
            now = time.monotonic()
            if state is None:
                if now - last_known > _LOST_SECONDS:
                    raise SpellError(f"SLURM knows nothing of job {job_id} any more; its logs: {job.logs}")
            else:
                last_known = now
                if shown is None or state.name != shown.name:
                    note(f"job {job_id} is {state.name.lower()}")
                elif state.code is not None and not _requeued(job, job_id, state):
                    logs.copy(out)  # seen twice: a job that SLURM requeues looks ended for a moment
                    return state
                shown = state
            time.sleep(min(_SLOWEST_POLL, 1 + (now - began) / 60))


def failures(job: PreparedRun, job_id: str) -> list[str]:
    """What srun said about ranks that failed, oldest first: `task 1: Exited with exit code 3`."""
    try:
        text = (job.logs / f"batch-{job_id}.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = re.findall(r"^srun: (?:error: )?(.*(?:exit code|Killed|Terminated|Aborted|fault).*)$", text, re.M)
    faults = [line.replace("task", "rank") for line in found]
    if option := re.search(r"^srun: (unrecognized option.*)$", text, re.M):
        faults.append(f"srun: {option[1]}; {remedy(option[1])}")
    return faults


@dataclass
class _Logs:
    """Reads on in every attempt's log, in the order in which the attempts started."""

    folder: Path
    job_id: str
    stack: ExitStack
    open: dict[Path, TextIO] = field(default_factory=dict)

    def copy(self, out: TextIO) -> None:
        for path in self._paths():
            if path not in self.open:
                file = path.open(encoding="utf-8", errors="replace", newline="\n")
                self.open[path] = self.stack.enter_context(file)
            for line in self.open[path]:
                out.write(tidy(_FIRST_RANK.sub("", line)))
                Terminal.printed = time.monotonic()
        out.flush()

    def _paths(self) -> Iterator[Path]:
        prefix = f"attempt-{self.job_id}-"
        found = ((path.stem.removeprefix(prefix), path) for path in self.folder.glob(f"{prefix}*.log"))
        return (path for _, path in sorted((int(n), path) for n, path in found if n.isdigit()))


_FIRST_RANK = re.compile(r"^ *0: ")  # srun labels every line with its rank; the first one's goes without


def _state(name: str, code: str, attempt: int = 0) -> JobState:
    if name not in _ENDED:
        return JobState(name, attempt=attempt)
    exit_code, _, number = code.partition(":")
    value = int(exit_code or 0) or (128 + int(number) if number.isdigit() and int(number) else 0)
    return JobState(name, 0 if name == "COMPLETED" else value or _ENDED[name], attempt)


def _requeued(job: PreparedRun, job_id: str, state: JobState) -> bool:
    """Whether the attempt sent itself back to the queue: its batch script is killed meanwhile, and the job
    looks as if it had ended by a signal until SLURM has counted the restart."""
    return (job.logs / f"{REQUEUED}{job_id}-{state.attempt}").exists()


def _field(text: str, key: str) -> str:
    found = re.search(rf"\b{key}=(\S+)", text)
    return found[1] if found else ""


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            command, 1, "", f"{command[0]} did not answer in {_COMMAND_SECONDS:.0f} s"
        )
    except OSError as error:
        raise SpellError(
            f"cannot run {command[0]}: {error}; launch from a login node of the cluster"
        ) from None
