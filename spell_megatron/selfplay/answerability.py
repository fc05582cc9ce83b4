"""Answerability probe: who reads the right documents must be able to answer.

Search Self-Play (arXiv 2510.18821) keeps a question only if it is answered from the documents that it was made of,
among a few others; there the check was worth ten points. Here one response reads what the questioner read and some
distractors of the cluster. A question that it misses is dropped, neither rewarded nor penalised: a penalty for bad
questions drove the questioner there into a spiral.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

UNANSWERABLE = "dropped:unanswerable"


def probed_documents(
    available: int, read: Sequence[int], distractors: int, random: Random
) -> tuple[int, ...]:
    """Indices, in document order, of what the probe reads in a cluster of `available` documents."""
    others = [index for index in range(available) if index not in read]
    return tuple(sorted([*read, *random.sample(others, min(distractors, len(others)))]))
