"""From rewards to advantages (paper, equations 8 and 9).

Both equations are one: rewards of comparable samples, centred and divided by their sample standard
deviation. Comparable are the G answers to one prompt (responder, verifier), and all questions of one
task in the batch (questioner, who has one sample per prompt). A scheme is a record of `ADVANTAGES`; one of the user's
own is named by its import path in `selfplay.advantage`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from spell_megatron import config
from spell_megatron.registry import Registry

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


@dataclass(frozen=True, slots=True)
class Advantages:
    """One value a sample, in the order of the rewards, and what there is to say of them all, by short names."""

    values: list[float]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How rewards become advantages.

    `compare(rewards, peers, scales)` compares each reward with those of equal `peers`; `scales` says whose standard
    deviation divides, where the scheme divides by one. All three are of one length.
    """

    name: str
    compare: Callable[[Sequence[float], Sequence[Key], Sequence[Key]], Advantages]


def standardised(rewards: Sequence[float], peers: Sequence[Key], scales: Sequence[Key]) -> Advantages:
    """`(r - mean) / (std + 1e-6)` with the sample standard deviation (n - 1); 0 for a lone reward."""
    spreads = {key: _std(group) for key, group in _grouped(scales, rewards).items()}
    centre = centred(rewards, peers, scales)
    values = [value / (spreads[scale] + EPSILON) for value, scale in zip(centre.values, scales, strict=True)]
    return Advantages(values, centre.metrics)


def centred(rewards: Sequence[float], peers: Sequence[Key], scales: Sequence[Key]) -> Advantages:
    """`r - mean`: Dr. GRPO (arXiv 2503.20783), in which a hard group weighs no more than an even one."""
    groups = _grouped(peers, rewards)
    means = {key: math.fsum(group) / len(group) for key, group in groups.items()}
    flat = sum(len(group) for group in groups.values() if max(group) == min(group))
    values = [
        reward - means[key] if len(groups[key]) > 1 else 0.0
        for key, reward in zip(peers, rewards, strict=True)
    ]
    return Advantages(values, {"flat": flat / len(rewards)} if rewards else {})


def leave_one_out(rewards: Sequence[float], peers: Sequence[Key], scales: Sequence[Key]) -> Advantages:
    """`r - mean of the others`: RLOO (arXiv 2402.14740); its baseline does not depend on the sample itself."""
    sizes = {key: len(group) for key, group in _grouped(peers, rewards).items()}
    centre = centred(rewards, peers, scales)
    values = [
        value * sizes[key] / max(sizes[key] - 1, 1) for value, key in zip(centre.values, peers, strict=True)
    ]
    return Advantages(values, centre.metrics)


ADVANTAGES = Registry(
    "scheme of advantages",
    Scheme,
    (
        Scheme("standardised", standardised),
        Scheme("centred", centred),
        Scheme("leave_one_out", leave_one_out),
    ),
)
"""`standardised` is the paper's. In all of them "flat" is the share of samples whose peers earned the same: they teach
nothing."""


def compare(
    settings: config.SelfPlay, rewards: Sequence[float], peers: Sequence[Key], tasks: Sequence[str]
) -> Advantages:
    """Advantages of a role's samples, as they are configured."""
    scheme = ADVANTAGES.find(settings.advantage, "selfplay.advantage")
    return scheme.compare(rewards, peers, list(map(SCALES[settings.beyond.std], peers, tasks)))


def _grouped(keys: Sequence[Key], rewards: Sequence[float]) -> dict[Key, list[float]]:
    groups: dict[Key, list[float]] = defaultdict(list)
    for key, reward in zip(keys, rewards, strict=True):
        groups[key].append(reward)
    return groups


def _std(rewards: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a lone reward."""
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / max(len(rewards) - 1, 1))
