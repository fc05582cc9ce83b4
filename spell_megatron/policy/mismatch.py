"""How far the engine's log-probs are from the learner's on the same tokens.

Of the same weights they would be equal. What remains is numerics, and a run whose gap grows is about to
collapse. For samples of older weights (`staleness`) the distance between two policies comes on top.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from spell_megatron.policy.scores import Scores
from spell_megatron.types import Group, Sample, TrainBatch, version_spans

_FEWEST = 0.01
"""Share of the tokens of a batch, or a group, below which those of the learner's weights say nothing of all."""


def mismatch(batch: TrainBatch, scores: Scores, labels: Sequence[str], version: int) -> dict[str, float]:
    """Gaps of the batch's response tokens; `labels` has one a group. Empty where no engine made any.

    `mismatch/mean` and `/max` are absolute, in nats; `/newest` is the mean over tokens that engines made by the
    learner's own weights, those of `version`, and missing where these are too few; `/compared` is their share; `/k3`
    is Schulman's estimator of KL(engine ‖ learner); and there is the mean for each label.
    """
    by_label: dict[str, list[np.ndarray]] = defaultdict(list)
    same: list[np.ndarray] = [np.zeros(0)]
    for group, learned, label in zip(batch.groups, scores.logprobs, labels, strict=True):
        for sample, gap in zip(group.samples, gaps_of(group, learned), strict=True):
            if len(gap):
                by_label[label].append(gap)
                same.append(_of_version(sample, gap, version))
    if not by_label:
        return {}
    gaps = {label: np.concatenate(parts) for label, parts in by_label.items()}
    every, newest = np.concatenate(list(gaps.values())), np.concatenate(same)
    share = len(newest) / len(every)
    return {
        "mismatch/mean": float(np.abs(every).mean()),
        "mismatch/max": float(np.abs(every).max()),
        **({"mismatch/newest": float(np.abs(newest).mean())} if share >= _FEWEST else {}),
        "mismatch/compared": share,
        "mismatch/k3": float(np.mean(np.expm1(every) - every)),
        **{f"mismatch/{label}": float(np.abs(gap).mean()) for label, gap in sorted(gaps.items())},
    }


def groups_beyond(batch: TrainBatch, scores: Scores, bound: float, version: int) -> frozenset[int]:
    """Places of the groups whose mean absolute gap, over tokens of the learner's own weights, is above `bound` nats."""

    def beyond(group: Group, learned: Sequence[np.ndarray]) -> bool:
        gaps = gaps_of(group, learned)
        pairs = zip(group.samples, gaps, strict=True)
        same = np.concatenate([np.zeros(0), *(_of_version(sample, gap, version) for sample, gap in pairs)])
        enough = len(same) > 0 and len(same) >= _FEWEST * sum(map(len, gaps))
        return enough and not np.abs(same).mean() <= bound

    pairs = zip(batch.groups, scores.logprobs, strict=True)
    return frozenset(place for place, pair in enumerate(pairs) if beyond(*pair))


def _of_version(sample: Sample, gap: np.ndarray, version: int) -> np.ndarray:
    """Of a sample's gaps those at tokens of one version; all where its engine does not tell versions."""
    spans = version_spans(sample) if len(gap) else []
    if not spans:
        return gap
    return np.concatenate([np.zeros(0), *(gap[first:end] for of, first, end in spans if of == version)])


def gaps_of(group: Group, learned: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Learner minus engine, float64 `[tokens]` for every sample; `[0]` where no engine made it."""
    return [
        ours.astype(np.float64) - np.asarray(sample.logprobs) if len(sample.logprobs) else np.zeros(0)
        for sample, ours in zip(group.samples, learned, strict=True)
    ]
