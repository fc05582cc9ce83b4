"""Means of a step's figures; a mean over nothing is None, and has no entry in the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from spell_megatron.types import Rollout


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    numbers = [float(value) for value in values]
    return fmean(numbers) if numbers else None


def by_task(name: str, values: Sequence[tuple[str, float]]) -> dict[str, float | None]:
    """The mean of each task, as `name/task`."""
    tasks = sorted({task for task, _ in values})
    return {f"{name}/{task}": mean(value for other, value in values if other == task) for task in tasks}


def lengths(role: str, rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Tokens per completion of a role, and the share that was cut at the limit."""
    return {
        f"{role}/length": mean(len(rollout.tokens) for rollout in rollouts),
        f"{role}/truncated": mean(rollout.finish == "length" for rollout in rollouts),
    }
