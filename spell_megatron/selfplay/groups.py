"""Rollouts and what they earned as the learner's groups: advantages become token weights here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from spell_megatron import config
from spell_megatron.selfplay.advantages import Advantages, compare
from spell_megatron.types import Group, Rollout, Sample


class Earned(NamedTuple):
    """Rollouts of one prompt, what each earned, and the task that they are of."""

    task: str
    rollouts: Sequence[Rollout]
    rewards: Sequence[float]


def compared_within(
    earned: Sequence[Earned], settings: config.SelfPlayConfig
) -> tuple[list[Group], Advantages]:
    """The groups of one role, the rollouts of each compared with each other."""
    peers = [place for place, group in enumerate(earned) for _ in group.rollouts]
    rewards = [reward for group in earned for reward in group.rewards]
    advantages = compare(settings, rewards, peers, [earned[place].task for place in peers])
    values = iter(advantages.values)
    return [group_of(one.rollouts, list(islice(values, len(one.rollouts)))) for one in earned], advantages


def group_of(rollouts: Sequence[Rollout], advantages: Sequence[float]) -> Group:
    """Rollouts of one prompt; every token of a response carries the response's advantage."""
    samples = tuple(
        Sample(
            rollout.tokens,
            [advantage] * len(rollout.tokens),
            rollout.logprobs,
            rollout.version,
            rollout.updates,
            rollout.experts,
        )
        for rollout, advantage in zip(rollouts, advantages, strict=True)
    )
    return Group(rollouts[0].prompt, samples, rollouts[0].prompt_experts)


def whole(number: float) -> int:
    """The whole number below; products such as 3 · (1/3) may fall short of one by less than is noticed here."""
    return math.floor(number + 1e-9)
