"""The one file that knows nemo-run (0.11.1): it writes a job's sbatch file.

Of nemo-run the executor and its template are used, not its runner: `Experiment.run` neither raises nor fails
when a job does, follows the log of the first attempt only, and asks `sacct` alone. What is submitted is the
written file, so that `--dryrun` shows what would run, and anyone may edit it and `sbatch` it.

The template quotes nothing: variables are exported as they stand and upper-cased, mounts and srun's arguments
are split by the shell. So the environment goes into `setup_lines`, and what is handed over is quoted here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
    warnings.simplefilter("ignore")
    import nemo_run
    from nemo_run.config import get_nemorun_home, set_nemorun_home
    from nemo_run.core.execution.slurm import SlurmJobDetails

from launchers import script
from launchers.job import PreparedRun
from launchers.profile import Profile
from spell_megatron.base.ownership import private

_TASK = "train"
_WATCH_SECONDS = 5  # between two looks at the steps of a job that has several
_MOUNTING = frozenset(",:")
_RESERVED = "/nemo_run"
"""Without a container, nemo-run replaces this wherever it stands in a script."""


@dataclass(kw_only=True)
class _Logs(SlurmJobDetails):
    """Logs straight in the run's folder: one of the batch script, one an attempt of its ranks."""

    step: str = "attempt"

    @property
    def stdout(self) -> Path:
        return Path(str(self.folder)) / "batch-%j.log"

    @property
    def srun_stdout(self) -> Path:
        return Path(str(self.folder)) / f"{self.step}-%j-${{SLURM_RESTART_COUNT:-0}}.log"


def refusals(job_folder: Path, mounted: Sequence[Path] = ()) -> list[str]:
    """Why nemo-run could not write a working script for a run in this folder, for which paths are to be mounted."""
    text, faults = str(job_folder), []
    if shlex.quote(text) != text or "%" in text:
        faults.append(
            f"the run folder {text!r} holds characters that a shell, or SLURM in a log's name, takes apart; choose"
            " another, runs=… name=…"
        )
    for path in mounted:
        if set(str(path)) & _MOUNTING:
            faults.append(
                f"{str(path)!r} is mounted into the container, and pyxis takes it apart at ',' and ':': rename it, or"
                " mount a folder above it (`mounts` of the profile)"
            )
    if _RESERVED in text:
        faults.append(
            f"the run folder {text!r} holds {_RESERVED!r}, which nemo-run rewrites; choose another, runs=…"
        )
    return faults


def write(job: PreparedRun) -> str:
    """Write `job.sbatch`, and return its text. It may hold secrets (`cluster.env`): no other user can read it."""
    with private(group_readable=False):
        return _write(job)


def _write(job: PreparedRun) -> str:
    home = get_nemorun_home()
    work = job.run / "launch"
    set_nemorun_home(str(work))
    logging.getLogger("nemo_run").setLevel(logging.WARNING)
    try:
        with (
            _apart(),
            _Experiment(
                "job",
                id="job_1",
                base_dir=str(work),
                log_level="WARN",
                clean_mode=True,
                enable_goodbye_message=False,
                skip_status_at_exit=True,
                serialize_metadata_for_scripts=False,
            ) as experiment,
        ):
            _add(experiment, job)
            experiment.dryrun(log=False, delete_exp_dir=False)
    finally:
        set_nemorun_home(home)
    written = work / "experiments" / "job" / "job_1" / f"{_TASK}_sbatch.sh"
    text = written.read_text(encoding="utf-8").rstrip() + "\n"
    job.sbatch.write_text(text, encoding="utf-8")
    return text


def _add(experiment: nemo_run.Experiment, job: PreparedRun) -> None:
    """The job's steps: its ranks, and the vLLM servers of the nodes where the launcher starts them."""
    on, ranks = job.machines, _step(script.rank_command(job))
    if not on.serving:
        experiment.add(ranks, executor=_executor(job, ["--label"]), name=_TASK)
        return
    trainer = _placed(range(on.nodes), on.ranks)
    engines = [*_placed(on.serving, 1), *([] if on.engine_nodes else ["--overlap"])]
    if job.profile.cpus_per_rank:
        engines.append(f"--cpus-per-task={job.profile.cpus_per_rank * on.ranks}")
    executors = [_executor(job, ["--label", *trainer]), _executor(job, engines)]
    executors[1].job_details = _Logs(folder=str(job.logs), step="engines")
    experiment.add([ranks, _step(script.engine_command(job))], executor=executors, name=_TASK)


def _step(command: str) -> nemo_run.Script:
    return nemo_run.Script(path="-c", args=[shlex.quote(command)], entrypoint="bash")


def _placed(nodes: range, tasks: int) -> list[str]:
    """Arguments that put a step on some of the job's nodes, with so many tasks on each."""
    return [
        f"--relative={nodes.start}",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes) * tasks}",
        f"--ntasks-per-node={tasks}",
    ]


class _Experiment(nemo_run.Experiment):
    """One that takes no handler from the log when it is collected, whenever that is; `__exit__` has cleaned up."""

    def __del__(self) -> None:
        pass


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Keep nemo-run off standard output, which is the script's, and off standard input, which it reads.

    And off the handlers of the log, which it closes to put its own in their place.
    """
    stdin, root = sys.stdin, logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with Path(os.devnull).open(encoding="utf-8") as nothing, contextlib.redirect_stdout(sys.stderr):
        sys.stdin, root.handlers = nothing, []
        try:
            yield
        finally:
            sys.stdin, root.handlers = stdin, handlers
            root.setLevel(level)


def _headers(profile: Profile) -> dict[str, str | bool]:
    return {
        name: value in ("true", "") or value for name, value in profile.sbatch.items() if value != "false"
    }


def _executor(job: PreparedRun, srun: list[str]) -> nemo_run.SlurmExecutor:
    profile, on = job.profile, job.machines
    return nemo_run.SlurmExecutor(
        account=profile.account or None,
        partition=profile.partition or None,
        qos=profile.qos or None,
        time=profile.time,
        nodes=on.allocated,
        ntasks_per_node=on.ranks,
        gpus_per_node=on.gpus or None,
        cpus_per_task=profile.cpus_per_rank,
        mem=profile.memory or None,
        exclusive=profile.exclusive or None,
        # To the ranks, never to the batch shell ("B:"): bash would die of it, and nothing be requeued.
        signal=f"USR1@{profile.warn_seconds}" if profile.warn_seconds else None,
        additional_parameters={"requeue": True, "comment": "spell-megatron", **_headers(profile)},
        container_image=shlex.quote(profile.container) if profile.container else None,
        container_mounts=[shlex.quote(mount) for mount in script.mounts(job)] if profile.container else [],
        container_env=sorted(profile.env) or None,
        # Rank 0 may end much later than the others: it writes the report. And it starts servers, which want more than
        # one rank's cores: none is bound to its own.
        srun_args=["--wait=0", "--cpu-bind=none", *srun],
        setup_lines=script.setup_lines(job),
        job_details=_Logs(folder=str(job.logs)),
        job_name_prefix=f"{job.name}.",
        packager=nemo_run.Packager(),
        tunnel=nemo_run.LocalTunnel(job_dir=""),  # anything else does not agree with nemo-run's home
        launcher=None,  # one srun task a rank, with nothing between it and SLURM's signals
        retries=0,  # the script's own ending decides what is requeued
        poll_estimated_start_time=False,
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=_WATCH_SECONDS,
    )
