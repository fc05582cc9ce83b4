"""Running a job on this machine: one process, or a starter's several."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import NoReturn

from launchers import ranks
from launchers.job import PreparedRun
from launchers.machines import Machines
from spell_megatron.base.interpreter import environment, python
from spell_megatron.base.topology import topology
from spell_megatron.config import Config


def here(config: Config) -> Machines:
    """This machine: a rank on each GPU that the engines leave, or as few as the layout needs where there is none."""
    import torch

    gpus, layout = torch.cuda.device_count(), config.policy.layout
    if not gpus:
        return Machines(ranks=layout.tensor * layout.pipeline * layout.context)
    alone = replace(config, cluster=replace(config.cluster, nodes=1, engine_nodes=0))
    return Machines(gpus=gpus, ranks=topology(alone, cuda=True, gpus=gpus).ranks)


def command(job: PreparedRun) -> list[str]:
    """The command line. A single process needs no starter."""
    trainer = ["-P", *job.trainer, str(job.run)]
    if job.machines.ranks == 1:
        return [sys.executable, *trainer]
    return python(ranks.__name__, str(job.machines.ranks), *trainer)


def run(job: PreparedRun) -> NoReturn:
    """Become the run: its signals, terminal and exit code are those of this process."""
    sys.stdout.flush()
    words = command(job)
    os.execve(words[0], words, environment() | job.profile.env)
