"""Bytes that a learner really holds: the truth that the planner's memory is compared with.

    python -m launchers.ranks N tests/support/measured_memory.py CASES.json OUT.json

Every case is a layout of a tiny model; rank 0 gathers one row per rank. Counted are the bytes of tensor
storages, each once: exact where resident set sizes are not.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from places import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.memory import LiveBytes  # noqa: E402


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes under tensors, shared storages counted once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def measure(case: dict[str, Any]) -> dict[str, int]:
    """One learner, one update: this rank's bytes."""
    from spell_megatron.config import LayoutConfig, OptimizerConfig, PolicyConfig
    from spell_megatron.policy.colocation import torch_optimizers
    from spell_megatron.policy.learner import Learner
    from spell_megatron.policy.world import start_world
    from spell_megatron.types import Group, Sample, TrainBatch

    policy = PolicyConfig(
        **{
            **case["policy"],
            "layout": LayoutConfig(**case.get("layout", {})),
            "optimizer": OptimizerConfig(**case.get("optimizer", {})),
        }
    )
    world = start_world(policy.layout, seed=0, timeout_seconds=120)
    learner = Learner(policy, Path(case["model"]), world)
    prompt, replies, reply = case["stream"]
    group = Group([3] * prompt, tuple(Sample([4] * reply, [1.0] * reply) for _ in range(replies)))
    batch = TrainBatch((group,) * (world.data_size * case.get("microbatches", 1)))
    learner.gradients(batch)  # what is made only once is there

    with LiveBytes() as live:
        learner.gradients(batch)
    learner.update(batch)
    parameters = [p for _, p in learner.named_parameters()]
    optimizers = list(torch_optimizers(learner.optimizer))
    states = [t for o in optimizers for s in o.state.values() for t in s.values()]
    masters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    weights = {p.untyped_storage()._cdata for p in parameters}
    return {
        "rank": world.rank,
        "parameters": sum(p.numel() for p in parameters),
        "weights": storage_bytes(parameters),
        "gradients": storage_bytes(p.main_grad for p in parameters),
        "optimizer": storage_bytes(t for t in states if t.numel() > 1)
        + storage_bytes(m for m in masters if m.untyped_storage()._cdata not in weights),
        "peak": live.peak,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = []
    for case in cases:
        mine = measure(case)
        rows: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(rows, mine)
        results.append(rows)
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(results))
    from spell_megatron.policy.world import stop_world

    stop_world()


if __name__ == "__main__":
    main()
