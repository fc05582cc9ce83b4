"""Program of test_objectives.py on two ranks: one update with every objective in every layout of two ranks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from reference import random_batch

from spell_megatron.config import LayoutConfig, LossConfig, OptimizerConfig, PolicyConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.types import TrainBatch

OBJECTIVES = {
    "ppo": LossConfig(clip_low=0.1, clip_high=0.15, importance_cap=1.1, entropy=0.02),
    "gspo by group, with kl": LossConfig(
        ratio="sequence", normalisation="group_mean", clip_low=0.02, clip_high=0.03, kl=0.5
    ),
    "dr. grpo": LossConfig(normalisation="sequence_length", max_response_tokens=32),
}
LAYOUTS = {
    "cp2": LayoutConfig(context=2),
    "tp2+sp": LayoutConfig(tensor=2, sequence=True),
    "pp2": LayoutConfig(pipeline=2),
    "dp2": LayoutConfig(),
}
# An eps of the gradients' size: Adam's step is then no mere sign of them, which rounding could flip.
OPTIMIZER = OptimizerConfig(lr=2e-2, eps=1e-2, weight_decay=0.0, clip_grad=1e9)


def batch_with_engine() -> TrainBatch:
    """A batch whose engine log-probs lie around those of a uniform distribution over 256 tokens."""
    draw = torch.Generator().manual_seed(0)
    groups = random_batch(256).groups
    return TrainBatch(
        tuple(
            replace(
                group,
                samples=tuple(
                    replace(s, logprobs=(-5.6 + torch.randn(len(s.tokens), generator=draw)).tolist())
                    for s in group.samples
                ),
            )
            for group in groups
        )
    )


def updated(
    folder: Path, world: World, layout: LayoutConfig, loss: LossConfig
) -> tuple[float, dict[str, torch.Tensor]]:
    """The clipped share and the weights after one batch in two minibatches, so that ratios are not one."""
    policy = PolicyConfig(
        layout=layout, loss=loss, optimizer=OPTIMIZER, dtype="float32", stream_tokens=192, head_chunk=16, minibatches=2
    )  # fmt: skip
    learner = Learner(policy, folder, world)
    clipped = learner.update(batch_with_engine()).said["clipped"]
    return clipped, {name: tensor.clone() for name, tensor in learner.weights()}


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {}
    for layout_name, layout in LAYOUTS.items():
        world = start_world(layout, seed=0, timeout_seconds=120)
        for name, loss in OBJECTIVES.items():
            results[layout_name, name] = updated(folder, world, layout, loss)
    if world.is_main:
        torch.save(results, out)
    stop_world()


if __name__ == "__main__":
    main()
