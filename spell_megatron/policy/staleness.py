"""How old the samples of an update are, and what their importance weights make of that.

Weights bear the number of the update that made them, and so does every token that they sampled. One that is
k updates old comes from another policy than the one that is trained; it is weighed with the ratio of the two,
truncated (`loss`). A mean weight far from 1 or many truncated ones say that k is too large.
"""

from __future__ import annotations

import numpy as np

from spell_megatron.policy.mismatch import gaps_of
from spell_megatron.policy.scores import Scores
from spell_megatron.types import TrainBatch, version_spans


def staleness(batch: TrainBatch, version: int) -> dict[str, float]:
    """Age of tokens in updates, seen from weights `version`: `staleness/mean` and `/max`; `/mixed`, the number of
    groups whose tokens are not all of one version; `/continued`, that of samples. Empty where no engine made any.
    """
    made = [[version_spans(sample) for sample in group.samples] for group in batch.groups]
    spans = [span for group in made for sample in group for span in sample]
    if not spans:
        return {}
    ages, tokens = zip(*((version - of, end - first) for of, first, end in spans), strict=True)
    return {
        "staleness/mean": float(np.average(ages, weights=tokens)),
        "staleness/max": float(max(ages)),
        "staleness/mixed": float(sum(len({of for sample in g for of, _, _ in sample}) > 1 for g in made)),
        "staleness/continued": float(sum(len(sample) > 1 for group in made for sample in group)),
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
