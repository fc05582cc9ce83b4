"""A baseline of the questioner that outlives the batch: a running mean of what its questions of a task earned.

Role-conditioned advantage estimation (SPIRAL, arXiv 2506.24119) compares a role with its own past instead of with the
others of the batch, so that a batch of bad questions is worse than a batch of good ones. Nothing is divided by a
standard deviation. The means are part of the run's state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

DECAY = 0.95
"""What a mean keeps of itself in a step."""


class Baselines:
    """Running means by task. A task's first batch is compared with its own mean."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def advantages(self, tasks: Sequence[str], rewards: Sequence[float]) -> list[float]:
        """`reward - mean` by the means of the steps before, which then take these rewards in."""
        earned: defaultdict[str, list[float]] = defaultdict(list)
        for task, reward in zip(tasks, rewards, strict=True):
            earned[task].append(reward)
        now = {task: fmean(values) for task, values in earned.items()}
        before = now | self._means
        self._means |= {task: DECAY * before[task] + (1 - DECAY) * mean for task, mean in now.items()}
        return [reward - before[task] for task, reward in zip(tasks, rewards, strict=True)]

    def state(self) -> dict[str, float]:
        return dict(self._means)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._means = {str(task): float(mean) for task, mean in state.items()}
