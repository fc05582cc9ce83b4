"""How old the samples of an update are, and what their importance weights make of that.

Weights bear the number of the update that made them, and so does whatever they sampled. A sample that is
k updates old comes from another policy than the one that is trained; its tokens are weighed with the ratio
of the two, truncated (`loss`). A mean weight far from 1 or many truncated ones say that k is too large.
"""

from __future__ import annotations

import numpy as np

from spell_megatron.policy.learner import Scores
from spell_megatron.policy.mismatch import gaps_of
from spell_megatron.types import TrainBatch


def staleness(batch: TrainBatch, version: int) -> dict[str, float]:
    """Age in updates, seen from weights `version`: `staleness/mean` and `/max` over samples, and `/mixed`, the
    number of groups whose samples are not all of one version. Empty where no engine made any."""
    ages = [
        [version - sample.version for sample in group.samples if sample.version is not None]
        for group in batch.groups
    ]
    every = [age for group in ages for age in group]
    if not every:
        return {}
    return {
        "staleness/mean": float(np.mean(every)),
        "staleness/max": float(max(every)),
        "staleness/mixed": float(sum(len(set(group)) > 1 for group in ages)),
    }


def importance(batch: TrainBatch, scores: Scores, cap: float | None) -> dict[str, float]:
    """`importance/weight`, the mean truncated weight over response tokens, and `/truncated`, the share of them
    at the cap. Empty without a cap: nothing is weighed."""
    ratios = [
        np.exp(gap)
        for group, learned in zip(batch.groups, scores.logprobs, strict=True)
        for gap in gaps_of(group, learned)
        if len(gap)
    ]
    if cap is None or not ratios:
        return {}
    every = np.concatenate(ratios)
    return {
        "importance/weight": float(np.minimum(every, cap).mean()),
        "importance/truncated": float((every > cap).mean()),
    }
