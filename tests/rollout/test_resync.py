"""Learner to engine: after every update the engine's log-probs are those of the learner's weights."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import make_model
from reference import reference

from spell_megatron.config import OptimizerConfig, PolicyConfig, RolloutConfig
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.mismatch import mismatch
from spell_megatron.policy.world import World
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.types import Group, Sample, TrainBatch

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}


def sampled_batch(
    engine: InProcessEngine, draw: random.Random, temperature: float, top_p: float
) -> TrainBatch:
    async def sample() -> list[Group]:
        groups = []
        for prompt in [[draw.randrange(3, 256) for _ in range(24)] for _ in range(3)]:
            rollouts = await engine.generate(
                prompt, seeds=[draw.randrange(1 << 30) for _ in range(3)], max_tokens=24,
                temperature=temperature, top_p=top_p,
            )  # fmt: skip
            samples = tuple(
                Sample(r.tokens, [draw.gauss(0, 1)] * len(r.tokens), r.logprobs) for r in rollouts
            )
            groups.append(Group(prompt, samples))
        return groups

    return TrainBatch(tuple(asyncio.run(sample())))


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("qwen3", {"rope_parameters": YARN}), ("qwen3_tied", {}), ("moe", {})],
    ids=["qwen3 with yarn", "qwen3_tied", "moe"],
)
def test_three_steps_stay_in_step(kind: Any, overrides: dict[str, Any], world: World, tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path / "model", seed=3, **overrides)
    # A rate so large that stale weights would show at once.
    policy = PolicyConfig(dtype="float32", stream_tokens=512, optimizer=OptimizerConfig(lr=1e-2))
    learner = Learner(policy, folder, world)
    settings = RolloutConfig(dtype="float32", max_model_len=128, max_num_seqs=16, kv_cache_mib=64, eager=True)
    engine = InProcessEngine(folder, settings, scratch=tmp_path / "engine", stop=())
    draw = random.Random(0)
    try:
        for step in range(1, 4):
            batch = sampled_batch(engine, draw, 1.0, 1.0)
            learner.update(batch)
            engine.update_weights(learner.weights(), version=step)
            fresh = sampled_batch(engine, draw, 1.0, 1.0)
            learner.save_hf(tmp_path / f"hf-{step}")
            expected = reference(tmp_path / f"hf-{step}", fresh).logprobs
            for group, truths in zip(fresh.groups, expected, strict=True):
                for sample, truth in zip(group.samples, truths, strict=True):
                    np.testing.assert_allclose(np.asarray(sample.logprobs), truth, atol=TOLERANCE)
        # Temperature and nucleus: the learner computes the distribution that the engine sampled from.
        learner.sampled = Sampled(0.7, 0.95)
        fresh = sampled_batch(engine, draw, 0.7, 0.95)
        gaps = mismatch(fresh, learner.score(fresh), ["all"] * len(fresh.groups), step)
        assert gaps["mismatch/max"] < TOLERANCE
        learner.sampled = Sampled(0.7, 1.0)
        blind = mismatch(fresh, learner.score(fresh), ["all"] * len(fresh.groups), step)
        assert blind["mismatch/max"] > 10 * TOLERANCE, "the nucleus made no difference: the test cannot fail"
    finally:
        engine.close()
