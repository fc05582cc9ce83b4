"""Staged lengths: short clusters first, longer ones from a step on.

QwenLong-L1.5 (arXiv 2512.12967) trains on inputs of 20K, then 60K, then 120K tokens. A stage bounds what is read of a
cluster: documents are left out from its end, so that those that stay keep their places, and what memory knows of them
holds in the next stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from spell_megatron.config import StageConfig
from spell_megatron.types import Cluster

FEWEST = 2
"""Documents that a cluster keeps in any case: a question has to combine some."""


def tokens_at(step: int, stages: Sequence[StageConfig]) -> int | None:
    """Tokens of a cluster at a step; None where no stage has begun."""
    begun = [stage for stage in stages if stage.step <= step]
    return max(begun, key=lambda stage: stage.step).tokens if begun else None


def staged(cluster: Cluster, tokens: int | None, count: Callable[[str], int]) -> Cluster:
    """The first documents of a cluster, as many as hold so many tokens."""
    if tokens is None:
        return cluster
    sums = accumulate(count(document.text) for document in cluster.documents)
    fitting = sum(total <= tokens for total in sums)
    return replace(cluster, documents=cluster.documents[: max(fitting, FEWEST)])
