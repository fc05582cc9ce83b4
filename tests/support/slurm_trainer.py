"""A stand-in for the trainer, for tests of what is around it: ranks that count together and save every step.

It is started as the trainer is (`python tests/support/slurm_trainer.py RUN …`), reads the run's `config.yaml`, and
stops on request through the same module. A run named `fails` loses its rank 1 in step 2, each time; one named `waits`
makes three steps in its first attempt, and then nothing until it is asked to stop. So does one named `lingers`, whose
rank 0 closes for some seconds what it has, and notes that it came to the end of that.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import yaml

from spell_megatron.run.preemption import Dismissed, Stop, attempt, listen, preempted
from spell_megatron.types import SpellError

STEP_SECONDS, LONG_SECONDS, LEAVING_SECONDS = 0.5, 3600.0, 12.0
FAILURE = 7


async def count(run: Path, stop: Stop) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = yaml.safe_load((run / "config.yaml").read_text())
    rank, size, saved = dist.get_rank(), dist.get_world_size(), run / "checkpoints"
    hosts: list[str] = [""] * size
    dist.all_gather_object(hosts, socket.gethostname())
    first = max((int(path.name.removeprefix("step-")) for path in saved.glob("step-*")), default=0) + 1
    _say(rank, f"{size} ranks on {' '.join(hosts)}, greeting {os.environ.get('GREETING')!r}")
    _say(rank, f"told {sys.argv[2:]}")
    waits = config["name"] in ("waits", "lingers") and attempt().endswith("-0")
    for step in range(first, config["steps"] + 1):
        seconds = LONG_SECONDS if waits and step > 3 else STEP_SECONDS
        box = [await stop.race(asyncio.sleep(seconds, True))] if rank == 0 else [None]
        dist.broadcast_object_list(box, src=0)
        if box[0] is None:
            error = preempted(run, step - 1, stop) if rank == 0 else Dismissed("preempted")
            dist.barrier()
            if rank == 0 and config["name"] == "lingers":
                await asyncio.sleep(LEAVING_SECONDS)
                (run / f"left-{attempt()}").touch()
            raise error
        if config["name"] == "fails" and step == 2 and rank == 1:
            os._exit(FAILURE)  # at once, as a crash is
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        assert total == sum(range(size))
        if rank == 0:
            (saved / f"step-{step:05d}").mkdir()
        _say(rank, f"step {step}")
    dist.barrier()
    dist.destroy_process_group()


def _say(rank: int, text: str) -> None:
    if rank == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    listening = listen()
    try:
        asyncio.run(count(Path(sys.argv[1]), listening))
    except SpellError as stopped:
        sys.stderr.write(f"{stopped}\n")
        sys.exit(stopped.exit_code)
