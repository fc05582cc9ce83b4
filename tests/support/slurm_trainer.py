"""A stand-in for the trainer, for tests of what is around it: ranks that count together and save every step.

It is started as the trainer is (`python tests/support/slurm_trainer.py RUN …`), reads the run's `config.yaml`, and
stops on request through the same module. A run named `fails` loses its rank 1 in step 2, each time; in one named
`starves` all ranks raise there what another attempt would raise again. One named `waits` or `lingers` makes three
steps in its first attempt, and then nothing until it is asked to stop. Rank 0 of `lingers` and `starves` takes some
seconds to close what it has, and notes that it came to the end of that.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from spell_megatron.run.preemption import Preempted, Stop, attempt, listen, preempted
from spell_megatron.types import SpellError

STEP_SECONDS, LONG_SECONDS, LEAVING_SECONDS = 0.5, 3600.0, 12.0
FAILURE = 7


class Starved(SpellError):
    exit_code = 2


def start(run: Path, stop: Stop) -> None:
    import torch
    import torch.distributed as dist

    from spell_megatron.policy.waiting import MainRank

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    config = yaml.safe_load((run / "config.yaml").read_text())
    world: Any = SimpleNamespace(size=size, is_main=rank == 0)
    try:
        with MainRank(world) as rank_0, closing(run, config["name"], rank), rank_0.announced():
            asyncio.run(count(run, config, stop, rank, size))
    finally:
        dist.destroy_process_group()


@contextmanager
def closing(run: Path, name: str, rank: int) -> Iterator[None]:
    try:
        yield
    except SpellError:
        if rank == 0 and name in ("lingers", "starves"):
            time.sleep(LEAVING_SECONDS)
            (run / f"left-{attempt()}").touch()
        raise


async def count(run: Path, config: dict[str, Any], stop: Stop, rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    name, saved = config["name"], run / "checkpoints"
    hosts: list[str] = [""] * size
    dist.all_gather_object(hosts, socket.gethostname())
    first = max((int(path.name.removeprefix("step-")) for path in saved.glob("step-*")), default=0) + 1
    _say(rank, f"{size} ranks on {' '.join(hosts)}, greeting {os.environ.get('GREETING')!r}")
    _say(rank, f"told {sys.argv[2:]}")
    waits = name in ("waits", "lingers") and attempt().endswith("-0")
    for step in range(first, config["steps"] + 1):
        seconds = LONG_SECONDS if waits and step > 3 else STEP_SECONDS
        box = [await stop.race(asyncio.sleep(seconds, True))] if rank == 0 else [None]
        dist.broadcast_object_list(box, src=0)
        if box[0] is None:
            raise preempted(run, step - 1, stop) if rank == 0 else Preempted("preempted")
        if name == "fails" and step == 2 and rank == 1:
            os._exit(FAILURE)  # at once, as a crash is
        if name == "starves" and step == 2:
            raise Starved("no question was kept")
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        assert total == sum(range(size))
        if rank == 0:
            (saved / f"step-{step:05d}").mkdir()
        _say(rank, f"step {step}")
    dist.barrier()


def _say(rank: int, text: str) -> None:
    if rank == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    listening = listen()
    try:
        start(Path(sys.argv[1]), listening)
    except SpellError as stopped:
        sys.stderr.write(f"{stopped}\n")
        sys.exit(stopped.exit_code)
