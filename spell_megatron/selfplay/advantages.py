"""From rewards to advantages (paper, equations 8 and 9).

Both equations are one: rewards of comparable samples, centred and divided by their sample standard
deviation. Comparable are the G answers to one prompt (responder, verifier), and all questions of one
task in the batch (questioner, who has one sample per prompt).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

EPSILON = 1e-6


Key = Hashable
SCALES: Mapping[str, Callable[[Key, str], Key]] = {
    "group": lambda peers, task: peers,
    "task": lambda peers, task: task,
    "batch": lambda peers, task: None,
}
"""Whose standard deviation divides: that of the samples compared, as in the paper, or of more of the batch.
QwenLong-L1.5 (arXiv 2512.12967) has that of the task: the few failures of an easy group then weigh no more than a hard
one's."""


def standardise(rewards: Sequence[float]) -> list[float]:
    """`(r - mean) / (std + 1e-6)` with the sample standard deviation (n - 1); 0 for a lone reward."""
    return standardise_by([None] * len(rewards), rewards)


def standardise_by(
    keys: Sequence[Key], rewards: Sequence[float], scales: Sequence[Key] | None = None
) -> list[float]:
    """`standardise` within the samples of each key, in the order given.

    With `scales` deviations are divided by the standard deviation of the samples of the same scale instead.
    """
    means = {key: math.fsum(group) / len(group) for key, group in _grouped(keys, rewards).items()}
    alone = {key for key, group in _grouped(keys, rewards).items() if len(group) < 2}
    spreads = {key: _std(group) for key, group in _grouped(scales or keys, rewards).items()}
    return [
        0.0 if key in alone else (reward - means[key]) / (spreads[scale] + EPSILON)
        for key, scale, reward in zip(keys, scales or keys, rewards, strict=True)
    ]


def _grouped(keys: Sequence[Key], rewards: Sequence[float]) -> dict[Key, list[float]]:
    groups: dict[Key, list[float]] = defaultdict(list)
    for key, reward in zip(keys, rewards, strict=True):
        groups[key].append(reward)
    return groups


def _std(rewards: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a lone reward."""
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / max(len(rewards) - 1, 1))
