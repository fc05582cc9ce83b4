"""Running a job on this machine: one process, or torchrun's several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import FrameType

from launchers.job import Job
from launchers.machines import Machines
from spell_megatron.config import Config
from spell_megatron.topology import topology


def here(config: Config) -> Machines:
    """This machine: a rank on each GPU that the engines leave, or as few as the layout needs where there is none."""
    import torch

    gpus, layout = torch.cuda.device_count(), config.policy.layout
    if not gpus:
        return Machines(ranks=layout.tensor * layout.pipeline * layout.context)
    alone = replace(config, cluster=replace(config.cluster, nodes=1, engine_nodes=0))
    return Machines(gpus=gpus, ranks=topology(alone, cuda=True, gpus=gpus).ranks)


def command(job: Job) -> list[str]:
    """The command line. A single process needs no torchrun between it and its exit code."""
    trainer = [*job.trainer, str(job.run)]
    if job.machines.ranks == 1:
        return [sys.executable, *trainer]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={job.machines.ranks}", *trainer]


def run(job: Job) -> int:
    """Run to the end; the exit code. A TERM or USR1 is passed on as TERM, on which the run saves itself."""
    process = subprocess.Popen(command(job), env=os.environ | job.profile.env)

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.terminate()

    def wait(number: int, frame: FrameType | None) -> None:
        """A Ctrl-C reaches the run by itself: it is of the same terminal."""

    handlers = {signal.SIGTERM: pass_on, signal.SIGUSR1: pass_on, signal.SIGINT: wait}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
