"""Program of test_waiting.py: two ranks of which one waits for the other.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=… python tests/support/waiting_ranks.py SECONDS [RANK…]

Rank 0 works for so long; collectives may take five. The store is rank 0's own, as under SLURM. The ranks that are named
raise an error: rank 0 alone at work, rank 1 alone meanwhile, both afterwards. Rank 0 says
when it has closed what it had, and rank 1 when it leaves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from spell_megatron.config import LayoutConfig
from spell_megatron.policy.waiting import MainRank
from spell_megatron.policy.world import World, start_world
from spell_megatron.types import SpellError

TIMEOUT_SECONDS, CLOSING_SECONDS = 5.0, 4.0


def main() -> None:
    torch.set_num_threads(1)
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=TIMEOUT_SECONDS)
    try:
        with MainRank(world) as rank_0, closing(world), rank_0.announced():
            run(world, rank_0)
    except SpellError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        if not world.is_main:
            _say_time()
        sys.exit(error.exit_code)


def run(world: World, rank_0: MainRank) -> None:
    rank_0.work("starts", lambda: None)
    if not world.is_main:
        _say_ready()
    failing = sys.argv[2:]
    if failing == ["1"] and world.rank == 1:
        raise SpellError("its disk is full")

    def play() -> str:
        _say_ready()
        time.sleep(float(sys.argv[1]))
        if failing == ["0"]:
            raise SpellError("no engine")
        return "played"

    word = rank_0.work("plays step 7", play)
    if failing == ["0", "1"]:
        raise SpellError("no question was kept")
    total = torch.ones(1)
    dist.all_reduce(total)
    sys.stdout.write(f"{word} {int(total)}\n")


@contextmanager
def closing(world: World) -> Iterator[None]:
    """Rank 0 has engines to close."""
    try:
        yield
    except SpellError:
        if world.is_main:
            time.sleep(CLOSING_SECONDS)
            _say_time()
        raise


def _say_time() -> None:
    sys.stdout.write(f"{time.monotonic()}\n")


def _say_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
