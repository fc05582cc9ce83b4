"""What a response and a question earn; the questioner's is equation 7 of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from spell_megatron import config

BAD_FORMAT, BAD_GROUND, ZERO_VARIANCE, KEPT = "bad_format", "bad_ground", "zero_variance", "kept"
UNJUDGED = "dropped:unjudged"
"""The external judge failed, and the reward of a response hangs on it."""
UNNOTED = "unnoted"
"""The questioner gives an answer that it did not come to (`noted`): as bad as a bad format."""
UNQUOTED = "unquoted"
"""It came to it by what its documents do not say (`quoted`): as bad."""
OUTVOTED = "outvoted"
"""Most responses agree on another answer than the reference (`outvoting`)."""
PAPER = (KEPT, BAD_FORMAT, BAD_GROUND, ZERO_VARIANCE)
"""What becomes of a question in the paper."""
MALFORMED = (BAD_FORMAT, UNNOTED, UNQUOTED)
"""As bad as a bad format."""
FAILURES = (*MALFORMED, BAD_GROUND, ZERO_VARIANCE, OUTVOTED)
"""Outcomes of a question that its questioner is trained on, besides the kept ones."""


COMBINE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "min": min,
    "mean": fmean,
    "sum": math.fsum,
}
"""How several opinions of one response make its reward; `max` is the paper's."""

SHAPES: Mapping[str, Callable[[float, config.SelfPlayConfig], float]] = {
    "gaussian": lambda mean, its: math.exp(-((mean - its.beyond.peak) ** 2) / (2 * its.questioner_sigma**2)),
    "reverse": lambda mean, its: 1 - mean,
    "linear": lambda mean, its: 1 - 2 * abs(mean - 0.5),
}
"""The worth of a question whose mean reward lies strictly between 0 and 1; those but `gaussian` are ablations."""


def responder_reward(opinions: Sequence[float | None], combine: str = "max") -> float:
    """What rule, verifier and external judge make together, of those that have an opinion; one has."""
    return COMBINE[combine]([float(opinion) for opinion in opinions if opinion is not None])


def is_settled(opinions: Sequence[float | None], combine: str) -> bool:
    """Whether no further opinion of 0 or 1 could change the reward."""
    return combine == "max" and 1.0 in opinions


def has_variance(rewards: Sequence[float]) -> bool:
    """Whether a group of responses teaches anything: its rewards are not all equal."""
    return max(rewards) > min(rewards)


def questioner_reward(outcome: str, mean: float, settings: config.SelfPlayConfig) -> float | None:
    """What a question earns, by its outcome and the mean reward of its responses (eq. 7).

    A question is worth most where half of the responses are right: at the frontier of what the policy
    can do. None for a dropped one, which is neither rewarded nor penalised.
    """
    if outcome in MALFORMED:
        return settings.bad_format_reward
    if outcome == BAD_GROUND:
        return settings.bad_ground_reward
    if outcome not in (KEPT, ZERO_VARIANCE, OUTVOTED):
        return None
    if outcome != KEPT or not 0 < mean < 1:
        return 0.0
    return SHAPES[settings.questioner_reward](mean, settings)
