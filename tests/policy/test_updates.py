"""One call of `Learner.update`: every minibatch sees all sorts of groups, and the schedule makes one step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from reference import random_batch

from spell_megatron.config import OptimizerConfig, PolicyConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.passes import Passes
from spell_megatron.policy.world import World
from spell_megatron.types import TrainBatch

pytestmark = pytest.mark.unit

BATCH = random_batch(256)
LR = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3_tied", tmp_path_factory.mktemp("model"))


def made(folder: Path, world: World, minibatches: int = 1, **optimizer: Any) -> Learner:
    rates = OptimizerConfig(**{"lr": LR, **optimizer})
    policy = PolicyConfig(dtype="float32", stream_tokens=192, minibatches=minibatches, optimizer=rates)
    return Learner(policy, folder, world)


def test_every_minibatch_sees_every_sort_of_groups(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch comes sorted by role: twelve groups of one sample, then six of three, then two of two."""
    one = BATCH.groups[0]
    sorts = {1: 12, 3: 6, 2: 2}
    groups = [
        replace(one, samples=one.samples[:1] * size) for size, count in sorts.items() for _ in range(count)
    ]
    trained = list[list[int]]()
    run = Passes.run

    def spied(self: Passes, batch: TrainBatch, models: Any, sampled: Any, *objective: Any) -> Any:
        if objective:
            trained.append([len(group.samples) for group in batch.groups])
        return run(self, batch, models, sampled, *objective)

    monkeypatch.setattr(Passes, "run", spied)
    made(folder, world, minibatches=2).update(TrainBatch(tuple(groups)))
    assert [sorted(sizes) for sizes in trained] == [[1] * 6 + [2] + [3] * 3] * 2


@pytest.mark.parametrize("count", [2, 3, 5, 100])
def test_scores_of_minibatches_stand_in_the_order_of_the_batch(
    folder: Path, world: World, count: int
) -> None:
    learner = made(folder, world, minibatches=count, lr=1e-9)
    alone = learner.score(BATCH)
    seen = learner.update(BATCH).scores
    for mine, whole in ((seen.logprobs, alone.logprobs), (seen.entropy, alone.entropy)):
        for group, other in zip(mine, whole, strict=True):
            for sample, same in zip(group, other, strict=True):
                torch.testing.assert_close(
                    torch.from_numpy(sample), torch.from_numpy(same), rtol=0, atol=1e-4
                )


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_schedule_counts_steps(folder: Path, world: World, minibatches: int) -> None:
    """However many updates a step makes: a cosine of four steps by its formula, and what is said is what was used."""
    learner = made(folder, world, minibatches, decay_steps=4, min_lr=1e-4)
    rates = [learner.update(BATCH).lr for _ in range(6)]
    cosine = [1e-4 + (LR - 1e-4) * (1 + math.cos(math.pi * min(step, 4) / 4)) / 2 for step in range(6)]
    assert rates == pytest.approx(cosine)


def test_the_first_step_of_a_warm_up_trains(folder: Path, world: World) -> None:
    learner = made(folder, world, warmup_steps=3)
    before = {name: tensor.clone() for name, tensor in learner.weights()}
    first = learner.update(BATCH)
    assert any(not torch.equal(before[name], tensor) for name, tensor in learner.weights())
    rates = [first.lr, *(learner.update(BATCH).lr for _ in range(4))]
    assert rates == pytest.approx([LR / 4, LR / 2, LR * 3 / 4, LR, LR])
