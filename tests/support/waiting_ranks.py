"""Program of test_waiting.py: two ranks of which one waits for the other.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=… python tests/support/waiting_ranks.py SECONDS

Rank 0 works for so long; collectives may take five. The store is rank 0's own, as under SLURM.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from spell_megatron.config import LayoutConfig
from spell_megatron.policy.waiting import MainRank
from spell_megatron.policy.world import start_world
from spell_megatron.types import SpellError

TIMEOUT_SECONDS = 5.0


def main() -> None:
    torch.set_num_threads(1)
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=TIMEOUT_SECONDS)
    rank_0 = MainRank(world)
    rank_0.work("starts", lambda: None)
    if not world.is_main:
        _say_ready()

    def play() -> str:
        _say_ready()
        time.sleep(float(sys.argv[1]))
        return "played"

    try:
        word = rank_0.work("plays step 7", play)
    except SpellError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    total = torch.ones(1)
    dist.all_reduce(total)
    sys.stdout.write(f"{word} {int(total)}\n")
    rank_0.close()


def _say_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
