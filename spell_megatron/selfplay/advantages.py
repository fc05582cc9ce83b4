"""From rewards to advantages (paper, equations 8 and 9).

Both equations are one: rewards of comparable samples, centred and divided by their sample standard
deviation. Comparable are the G answers to one prompt (responder, verifier), and all questions of one
task in the batch (questioner, who has one sample per prompt). A scheme is a record of `ADVANTAGES`; one of the user's
own is named by its import path in `selfplay.advantage`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from spell_megatron import config
from spell_megatron.base.registry import Registry

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


def standardise(rewards: Sequence[float]) -> list[float]:
    """`(r - mean) / (std + 1e-6)` with the sample standard deviation (n - 1); 0 for a lone reward."""
    return standardise_by([None] * len(rewards), rewards)


def standardise_by(
    keys: Sequence[Key], rewards: Sequence[float], scales: Sequence[Key] | None = None
) -> list[float]:
    """`standardise` within the samples of each key, in the order given.

    With `scales` deviations are divided by the standard deviation of the samples of the same scale instead.
    """
    spreads = {key: _std(group) for key, group in _grouped(scales or keys, rewards).items()}
    return [
        deviation / (spreads[scale] + EPSILON)
        for deviation, scale in zip(centre(keys, rewards), scales or keys, strict=True)
    ]


def centre(keys: Sequence[Key], rewards: Sequence[float]) -> list[float]:
    """`r - mean` within the samples of each key; 0 for a lone reward."""
    groups = _grouped(keys, rewards)
    means = {key: math.fsum(group) / len(group) for key, group in groups.items()}
    return [
        reward - means[key] if len(groups[key]) > 1 else 0.0
        for key, reward in zip(keys, rewards, strict=True)
    ]


def _standardised(rewards: Sequence[float], peers: Sequence[Key], scales: Sequence[Key]) -> Advantages:
    return Advantages(standardise_by(peers, rewards, scales), _flat(rewards, peers))


def _centred(rewards: Sequence[float], peers: Sequence[Key], scales: Sequence[Key]) -> Advantages:
    """Dr. GRPO (arXiv 2503.20783), in which a hard group weighs no more than an even one."""
    return Advantages(centre(peers, rewards), _flat(rewards, peers))


def _left_out(rewards: Sequence[float], peers: Sequence[Key], scales: Sequence[Key]) -> Advantages:
    """RLOO (arXiv 2402.14740): compared with the mean of the others, which the sample itself has no part in."""
    sizes = Counter(peers)
    values = [
        deviation * sizes[key] / max(sizes[key] - 1, 1)
        for deviation, key in zip(centre(peers, rewards), peers, strict=True)
    ]
    return Advantages(values, _flat(rewards, peers))


def _flat(rewards: Sequence[float], peers: Sequence[Key]) -> dict[str, float]:
    """The share of samples whose peers all earned the same: they teach nothing."""
    flat = sum(len(group) for group in _grouped(peers, rewards).values() if max(group) == min(group))
    return {"flat": flat / len(rewards)} if rewards else {}


ADVANTAGES = Registry(
    "scheme of advantages",
    Scheme,
    (
        Scheme("standardised", _standardised),
        Scheme("centred", _centred),
        Scheme("leave_one_out", _left_out),
    ),
)
"""`standardised` is the paper's."""


def compare(
    settings: config.SelfPlayConfig, rewards: Sequence[float], peers: Sequence[Key], tasks: Sequence[str]
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
