"""Program of test_resync_fleet.py: ranks train, two vLLM servers on their devices follow.

    python -m launchers.ranks 2 tests/support/resync_fleet.py OUT KIND=FOLDER …

For every model two servers are started once; then every layout makes two training steps with a learner of its
own, starting over from the folder. After each resync the servers sample, and the learner scores what they did. At
the end the last model's servers are stopped and killed in the middle of a resync.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spell_megatron.config import LayoutConfig, OptimizerConfig, PolicyConfig, RolloutConfig, ServersConfig
from spell_megatron.policy.agreement import share
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.mismatch import mismatch
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.rollout import backend
from spell_megatron.rollout.engine import WeightsWanted
from spell_megatron.rollout.fleet import Fleet
from spell_megatron.rollout.follower import FollowerEngine
from spell_megatron.rollout.health import State
from spell_megatron.types import Group, Sample, TrainBatch

LAYOUTS = {
    2: {
        "tp2": LayoutConfig(tensor=2, sequence=True),
        "dp2": LayoutConfig(),
        "pp2": LayoutConfig(pipeline=2),
        "ep2": LayoutConfig(expert=2),
    },
    4: {
        "tp2pp2": LayoutConfig(tensor=2, sequence=True, pipeline=2),
        "ep2pp2": LayoutConfig(expert=2, pipeline=2),
    },
}
STEPS = 2
FAULTS = {"stopped": (1, signal.SIGSTOP), "killed": (0, signal.SIGKILL)}
"""In the middle of a resync, and after it nobody else is left: which server, and how."""
BUCKET_BYTES = 48 << 10
"""So little that layers are cut in pieces, and that one tensor does not fit."""
# A rate so large that stale weights would show at once.
POLICY = PolicyConfig(dtype="float32", stream_tokens=512, optimizer=OptimizerConfig(lr=1e-2))
SETTINGS = RolloutConfig(
    dtype="float32",
    max_model_len=128,
    max_num_seqs=16,
    max_batched_tokens=512,
    kv_cache_mib=32,
    servers=ServersConfig(count=2, transfer="shm", verify="checksum", start_seconds=300, sync_seconds=10),
)
Weights = Iterable[tuple[str, torch.Tensor]]


class Following:
    """Two servers and a learner after another; rows of what became of each resync."""

    def __init__(self, kind: str, folder: Path, scratch: Path) -> None:
        self.kind, self.folder = kind, folder
        self.rows: list[dict[str, Any]] = []
        self._scratch = scratch
        self._version, self._draw = 0, random.Random(0)
        self._engine: Fleet | FollowerEngine | None = None

    @property
    def fleet(self) -> Fleet | None:
        return self._engine if isinstance(self._engine, Fleet) else None

    def through(self, layouts: dict[str, LayoutConfig], faults: bool) -> None:
        """Train in every layout; `stale` is the gap of the batch before, which older weights made."""
        try:
            for name, layout in layouts.items():
                if layout.expert > 1 and self.kind != "moe":
                    continue
                self._begin(layout)
                batch: TrainBatch | None = None
                for step in range(STEPS + 1):
                    row: dict[str, Any] = {"layout": name, "step": step}
                    if batch is not None:
                        self._learner.update(batch)
                        row["stale"] = self._gap(batch)
                    batch = self._resync(row)
            if faults:
                self._break(batch)
        finally:
            if self._engine is not None:
                self._engine.close()

    def _begin(self, layout: LayoutConfig) -> None:
        self._world = start_world(layout, seed=0, timeout_seconds=600)
        scratch = self._scratch / "vllm"
        if self._engine is None and self._world.is_main:
            logs = self._scratch / self.kind
            self._engine = Fleet(self.folder, SETTINGS, scratch=scratch, logs=logs, stop=())
        elif self._engine is None:
            self._engine = FollowerEngine(self.folder, "shm", scratch=scratch)
        self._learner = Learner(replace(POLICY, layout=layout), self.folder, self._world)

    def _resync(self, row: dict[str, Any], fault: tuple[int, int] | None = None) -> TrainBatch:
        """A new version for the servers, and a batch of theirs; sent again where nobody holds it."""
        assert self._engine is not None
        self._version += 1
        began, sent = time.monotonic(), 0
        batch: TrainBatch | None = None
        while batch is None:
            weights = self._learner.weights()
            if fault and self.fleet and not sent:
                weights = striking(weights, self.fleet.process_groups()[f"engine-{fault[0]}"], fault[1])
            self._engine.update_weights(weights, self._version)
            if not sent:
                row |= {"kind": self.kind, "version": self._version, "seconds": time.monotonic() - began}
                row["held"] = self._held()
            sent += 1
            batch = self._sampled()
        self.rows.append({**row, "sent": sent, "gap": self._gap(batch)})
        return batch

    def _break(self, batch: TrainBatch | None) -> None:
        """One server is stopped, and while its successor starts the other one is killed; then both come back."""
        for name, fault in FAULTS.items():
            assert batch is not None
            self._learner.update(batch)
            batch = self._resync({"layout": name, "step": 1}, fault)
        while self.fleet and not all(
            health.state in (State.SYNCING, State.HEALTHY) for health in self.fleet.states().values()
        ):
            time.sleep(0.2)
        self._resync({"layout": "recovered", "step": 1})

    def _held(self) -> list[int | None]:
        states = self.fleet.states().values() if self.fleet else ()
        return [health.held if health.serves else None for health in states]

    def _sampled(self) -> TrainBatch | None:
        """Groups of random prompts, answered by whoever serves; None where they ask for weights first."""
        try:
            batch = asyncio.run(self._groups(self.fleet)) if self.fleet else None
        except WeightsWanted:
            batch = None
        return share(lambda: batch, self._world)

    async def _groups(self, engine: Fleet) -> TrainBatch:
        async def group() -> Group:
            prompt = [self._draw.randrange(3, 256) for _ in range(24)]
            seeds = [self._draw.randrange(1 << 30) for _ in range(3)]
            rollouts = await engine.generate(prompt, seeds=seeds, max_tokens=16, temperature=1.0, top_p=1.0)
            samples = (
                Sample(r.tokens, [self._draw.gauss(0, 1)] * len(r.tokens), r.logprobs) for r in rollouts
            )
            return Group(prompt, tuple(samples))

        return TrainBatch(tuple(await asyncio.gather(*(group() for _ in range(4)))))

    def _gap(self, batch: TrainBatch) -> float:
        scores = self._learner.score(batch)
        if not self._world.is_main:
            return 0.0
        return mismatch(batch, scores, ["all"] * len(batch.groups), 0).get("mismatch/max", 0.0)

    _learner: Learner
    _world: World


def striking(weights: Weights, group: int, number: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A stream in the middle of which a process group is sent a signal."""
    for index, weight in enumerate(weights):
        if index == 10:
            os.killpg(group, number)
        yield weight


def main() -> None:
    torch.set_num_threads(1)
    out, *models = sys.argv[1:]
    scratch = Path(out).parent
    backend.quiet()
    with backend.undisturbed(scratch):
        from spell_megatron.rollout.transfer import shm

        shm._BUCKET_BYTES = BUCKET_BYTES
    layouts = LAYOUTS[int(os.environ["WORLD_SIZE"])]
    rows = []
    for model in models:
        kind, folder = model.split("=")
        following = Following(kind, Path(folder), scratch)
        following.through(layouts, faults=model == models[-1] and "tp2" in layouts)
        rows += following.rows
    main_rank = torch.distributed.get_rank() == 0
    stop_world()
    if main_rank:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
