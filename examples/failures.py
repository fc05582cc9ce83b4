"""A scheme of one's own: failures teach, and successes a tenth as much (arXiv 2506.01347).

What is rewarded takes probability from everything else. What is punished gives its own to whatever else was likely, so
that answers stay diverse. What that does to the best of several, the hard world shows (docs/evidence.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from spell_megatron.selfplay.advantages import Advantages, Key, Scheme, standardise_by

WEIGHT = 0.1


def compare(rewards: Sequence[float], peers: Sequence[Key], scales: Sequence[Key]) -> Advantages:
    values = standardise_by(peers, rewards, scales)
    return Advantages([WEIGHT * value if value > 0 else value for value in values])


FAILURES = Scheme("failures", compare)
