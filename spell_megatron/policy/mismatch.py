"""How far the engine's log-probs are from the learner's on the same tokens.

Of the same weights they would be equal. What remains is numerics, and a run whose gap grows is about to
collapse. For samples of older weights (`staleness`) the distance between two policies comes on top.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from spell_megatron.policy.scores import Scores
from spell_megatron.types import Group, TrainBatch, version_spans


def mismatch(batch: TrainBatch, scores: Scores, labels: Sequence[str]) -> dict[str, float]:
    """Gaps of the batch's response tokens; `labels` has one a group. Empty where no engine made any.

    `mismatch/mean` and `/max` are absolute, in nats; `/newest` is the mean over tokens of the newest weights
    in the batch; `/k3` is Schulman's estimator of KL(engine ‖ learner); and there is the mean for each label.
    """
    by_label: dict[str, list[np.ndarray]] = defaultdict(list)
    by_version: dict[int, list[np.ndarray]] = defaultdict(list)
    for group, learned, label in zip(batch.groups, scores.logprobs, labels, strict=True):
        for sample, gap in zip(group.samples, gaps_of(group, learned), strict=True):
            if len(gap):
                by_label[label].append(gap)
                for version, first, end in version_spans(sample) or [(-1, 0, len(gap))]:
                    by_version[version].append(gap[first:end])
    if not by_label:
        return {}
    gaps = {label: np.concatenate(parts) for label, parts in by_label.items()}
    every = np.concatenate(list(gaps.values()))
    newest = np.concatenate(by_version[max(by_version)])
    return {
        "mismatch/mean": float(np.abs(every).mean()),
        "mismatch/max": float(np.abs(every).max()),
        "mismatch/newest": float(np.abs(newest).mean()),
        "mismatch/k3": float(np.mean(np.expm1(every) - every)),
        **{f"mismatch/{label}": float(np.abs(gap).mean()) for label, gap in sorted(gaps.items())},
    }


def groups_beyond(batch: TrainBatch, scores: Scores, bound: float) -> frozenset[int]:
    """Places of the groups whose mean absolute gap is above `bound`, in nats."""
    means = [
        np.abs(np.concatenate([np.zeros(0), *gaps_of(group, learned)]))
        for group, learned in zip(batch.groups, scores.logprobs, strict=True)
    ]
    return frozenset(place for place, gap in enumerate(means) if len(gap) and not gap.mean() <= bound)


def gaps_of(group: Group, learned: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Learner minus engine, float64 `[tokens]` for every sample; `[0]` where no engine made it."""
    return [
        ours.astype(np.float64) - np.asarray(sample.logprobs) if len(sample.logprobs) else np.zeros(0)
        for sample, ours in zip(group.samples, learned, strict=True)
    ]
