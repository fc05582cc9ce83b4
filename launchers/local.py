"""Running a job on this machine: one process, or a starter's several."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from math import lcm
from typing import NoReturn

from launchers import ranks
from launchers.job import COMMAND, PreparedRun
from launchers.machines import Machines
from launchers.profile import ProfileError
from spell_megatron.base.interpreter import environment, python
from spell_megatron.base.topology import topology
from spell_megatron.config import Config


def here(config: Config) -> Machines:
    """This machine: a rank on each GPU that the engines leave, or as few as the layout needs where there is none."""
    import torch

    gpus, layout = torch.cuda.device_count(), config.policy.layout
    if not gpus:
        dense = layout.tensor * layout.pipeline * layout.context
        return Machines(ranks=lcm(dense, layout.expert * layout.expert_tensor * layout.pipeline))
    alone = replace(config, cluster=replace(config.cluster, nodes=1, engine_nodes=0))
    return Machines(gpus=gpus, ranks=topology(alone, cuda=True, gpus=gpus).ranks)


def take_ranks(config: Config) -> None:
    """Start this very command again as the ranks that a run takes of this machine, and become their starter.

    Returns where the run takes this process alone, and where this process is a rank already. Raises ProfileError for
    a run of several nodes.
    """
    if "RANK" in os.environ:
        return
    nodes = config.cluster.nodes + config.cluster.engine_nodes
    if nodes > 1:
        raise ProfileError(
            f"this run takes {nodes} nodes, and this machine is one: `sbatch RUN/job.sbatch` goes on with a run,"
            " `launch --executor slurm` begins one; cluster.nodes=1 cluster.engine_nodes=0 takes this machine alone"
        )
    if (count := here(config).ranks) == 1:
        return
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # of `listen`; the starter passes it on
    words = python(ranks.__name__, str(count), "-P", *COMMAND, *sys.argv[1:])
    os.execve(words[0], words, environment())


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
    # One rank is all that there is to be then, whatever GPUs this machine has: `take_ranks` starts no others.
    alone = {"RANK": "0"} if job.machines.ranks == 1 else {}
    os.execve(words[0], words, environment() | job.profile.env | alone)
