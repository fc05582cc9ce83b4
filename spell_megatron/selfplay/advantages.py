"""From rewards to advantages (paper, equations 8 and 9).

Both equations are one: rewards of comparable samples, centred and divided by their sample standard
deviation. Comparable are the G answers to one prompt (responder, verifier), and all questions of one
task in the batch (questioner, who has one sample per prompt).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

EPSILON = 1e-6


def standardise(rewards: Sequence[float]) -> list[float]:
    """`(r - mean) / (std + 1e-6)` with the sample standard deviation (n - 1); 0 for a lone reward."""
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    deviations = [reward - mean for reward in rewards]
    std = math.sqrt(math.fsum(d * d for d in deviations) / (len(rewards) - 1))
    return [d / (std + EPSILON) for d in deviations]


def standardise_by(keys: Sequence[str], rewards: Sequence[float]) -> list[float]:
    """`standardise` within the samples of each key, in the order given."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    advantages = [0.0] * len(rewards)
    for group in places.values():
        for place, advantage in zip(group, standardise([rewards[i] for i in group]), strict=True):
            advantages[place] = advantage
    return advantages
