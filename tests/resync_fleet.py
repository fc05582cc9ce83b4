"""Program of test_resync_fleet.py under torchrun: two ranks train, two vLLM servers follow.

    torchrun --nproc-per-node 2 tests/resync_fleet.py OUT KIND=FOLDER …

For every model two servers are started once; then every layout makes two training steps with a learner of its
own, starting over from the folder. After each resync the servers sample, and the learner scores what they did.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spell_megatron.config import Layout, Optimizer, Policy, Rollout, Servers
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.mismatch import mismatch
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.rollout.fleet import Fleet
from spell_megatron.session import share
from spell_megatron.types import Group, Sample, TrainBatch

LAYOUTS = {"tp2": Layout(tensor=2, sequence=True), "dp2": Layout()}
STEPS = 2
# A rate so large that stale weights would show at once.
POLICY = Policy(dtype="float32", stream_tokens=512, optimizer=Optimizer(lr=1e-2))
SETTINGS = Rollout(
    dtype="float32",
    max_model_len=128,
    max_num_seqs=16,
    max_batched_tokens=512,
    kv_cache_mib=32,
    servers=Servers(count=2, verify="checksum", start_seconds=300, sync_seconds=60),
)


def follow(kind: str, folder: Path, scratch: Path) -> list[dict[str, Any]]:
    """Train in every layout; rows of `mismatch` after each resync, and of the same batch one step later."""
    rows: list[dict[str, Any]] = []
    fleet: Fleet | None = None
    version, draw = 0, random.Random(0)
    try:
        for name, layout in LAYOUTS.items():
            world = start_world(layout, seed=0, timeout_seconds=600)
            if world.is_main and fleet is None:
                fleet = Fleet(folder, SETTINGS, scratch=scratch / "vllm", logs=scratch / kind, stop=())
            learner = Learner(replace(POLICY, layout=layout), folder, world)
            batch: TrainBatch | None = None
            for step in range(STEPS + 1):
                row: dict[str, Any] = {"kind": kind, "layout": name, "step": step}
                if batch is not None:
                    learner.update(batch)
                    row["stale"] = _gap(learner, batch)
                version += 1
                _resync(fleet, learner, version)
                batch = _sampled(fleet, draw, world)
                rows.append({**row, **_report(fleet), "version": version, "gap": _gap(learner, batch)})
    finally:
        if fleet is not None:
            fleet.close()
    return rows


def _resync(fleet: Fleet | None, learner: Learner, version: int) -> None:
    if fleet is not None:
        fleet.update_weights(learner.weights(), version)
    else:
        for _ in learner.weights():
            pass


def _sampled(fleet: Fleet | None, draw: random.Random, world: World) -> TrainBatch:
    """Groups of random prompts, answered by both servers."""

    async def group(engine: Fleet) -> Group:
        prompt = [draw.randrange(3, 256) for _ in range(24)]
        seeds = [draw.randrange(1 << 30) for _ in range(3)]
        rollouts = await engine.generate(prompt, seeds=seeds, max_tokens=16, temperature=1.0, top_p=1.0)
        return Group(
            prompt, tuple(Sample(r.tokens, [draw.gauss(0, 1)] * len(r.tokens), r.logprobs) for r in rollouts)
        )

    async def groups(engine: Fleet) -> TrainBatch:
        return TrainBatch(tuple(await asyncio.gather(*(group(engine) for _ in range(4)))))

    return share(asyncio.run(groups(fleet)) if fleet is not None else TrainBatch(()), world)


def _gap(learner: Learner, batch: TrainBatch) -> float:
    return mismatch(batch, learner.score(batch), ["all"] * len(batch.groups)).get("mismatch/max", 0.0)


def _report(fleet: Fleet | None) -> dict[str, Any]:
    return {"held": [health.held for health in fleet.states().values() if health.serves]} if fleet else {}


def main() -> None:
    torch.set_num_threads(1)
    out, *models = sys.argv[1:]
    rows = []
    for model in models:
        kind, folder = model.split("=")
        rows += follow(kind, Path(folder), Path(out).parent)
    main_rank = torch.distributed.get_rank() == 0
    stop_world()
    if main_rank:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
