"""Program of test_checkpoint.py: save after one update, or load; then two more updates.

The state is written while those two go on; what was loaded is saved again beside it. A load asks for step 2 first,
which is damaged. Besides, of every rank: how many bytes it copies to host memory and writes in a save, and reads in a
load, what it was told of step 2, and which files it has digested.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from reference import random_batch

from spell_megatron.config import LayoutConfig, OptimizerConfig, PolicyConfig
from spell_megatron.policy.checkpoint import Checkpoints, load_learner, search
from spell_megatron.policy.checkpoint.files import digests
from spell_megatron.policy.checkpoint.write import HostCopy, Staged
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.waiting import MainRank
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.types import SpellError


def main() -> None:
    mode, folder, layout = sys.argv[1], Path(sys.argv[2]), LayoutConfig(**json.loads(sys.argv[3]))
    torch.set_num_threads(1)
    world = start_world(layout, seed=0, timeout_seconds=120)
    # An eps of the gradients' size: Adam's step is then no mere sign of them, which rounding could flip.
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-2, weight_decay=0.0, distributed=True)
    policy = PolicyConfig(layout=layout, dtype="float32", stream_tokens=512, optimizer=optimizer)
    learner = Learner(policy, folder / "model", world)
    batch, checkpoints = random_batch(256), Checkpoints(folder / "checkpoints", background=True)
    read, refused, digested = 0, "", list[str]()
    if mode == "save":
        learner.update(batch)
        checkpoints.save(1, learner, {})
    else:
        search.digests = partial(noted, digested)
        with MainRank(world) as rank_0:
            try:
                checkpoints.restore(learner, 2, rank_0)
            except SpellError as fault:
                refused = str(fault)
            found = checkpoints.restore(learner, None, rank_0)
        assert found
        read = load_learner(learner, found)
        Checkpoints(folder / "again").save(1, learner, {})
    copy, sums = HostCopy(), []
    Staged(learner, folder, copy)
    for _ in range(2):
        learner.update(batch)
        sums.append(sum(float(s.sum()) for group in learner.score(batch).logprobs for s in group))
    checkpoints.wait()
    mine = {"staged": copy.memory.numel(), "read": read, "refused": refused, "digested": digested}
    ranks = [mine] * world.size
    dist.all_gather_object(ranks, mine)
    if world.is_main:
        (folder / f"{mode}.json").write_text(json.dumps({"sums": sums, "ranks": ranks}), encoding="utf-8")
    stop_world()


def noted(into: list[str], folder: Path, names: Collection[str]) -> dict[str, str]:
    into += (f"{folder.name}/{name}" for name in names)
    return digests(folder, names)


if __name__ == "__main__":
    main()
