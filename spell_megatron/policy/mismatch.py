"""How far the engine's log-probs are from the learner's on the same tokens and weights.

Exactly on-policy they would be equal. What remains is numerics (and, with stale rollouts, the distance
between two versions), and a run whose gap grows is about to collapse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from spell_megatron.policy.learner import Scores
from spell_megatron.types import TrainBatch


def mismatch(batch: TrainBatch, scores: Scores, labels: Sequence[str]) -> dict[str, float]:
    """`mismatch/mean` and `/max` (absolute, nats), `/k3` (Schulman's estimator of KL(engine ‖ learner)), and
    the mean for each label of the batch's groups. Empty where no sample carries engine log-probs."""
    by_label: dict[str, list[np.ndarray]] = defaultdict(list)
    for group, learned, label in zip(batch.groups, scores.logprobs, labels, strict=True):
        for sample, ours in zip(group.samples, learned, strict=True):
            if len(sample.logprobs):
                by_label[label].append(ours.astype(np.float64) - np.asarray(sample.logprobs))
    if not by_label:
        return {}
    gaps = {label: np.concatenate(parts) for label, parts in by_label.items()}
    every = np.concatenate(list(gaps.values()))
    return {
        "mismatch/mean": float(np.abs(every).mean()),
        "mismatch/max": float(np.abs(every).max()),
        "mismatch/k3": float(np.mean(np.expm1(every) - every)),
        **{f"mismatch/{label}": float(np.abs(gap).mean()) for label, gap in sorted(gaps.items())},
    }
