"""What a questioner reads.

With a history the questioner reads every document that a remembered question brings, and `m` fresh ones. What a
question brings is one of two things. In the authors' code it is all that its questioner read: the newest one then
holds the documents of all before it, and the context grows with each success up to the whole cluster. In the paper
(Algorithm 1) it is the fresh documents alone: the ring forgets the oldest, and there are at most (L + 1) m. With the
20 documents of a 16K cluster and m = 5 the two hardly differ; with the 100 of a 100K cluster they do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from spell_megatron.selfplay.memory import Remembered


def choose_documents(
    available: int, history: Sequence[Remembered], fresh: int, random: random.Random
) -> tuple[int, ...]:
    """Indices of the documents to read, in document order.

    All remembered ones of a cluster of `available` documents, and `fresh` others (fewer if there are
    no more).
    """
    known = {index for entry in history for index in entry.documents if 0 <= index < available}
    others = [index for index in range(available) if index not in known]
    return tuple(sorted(known.union(random.sample(others, min(fresh, len(others))))))


def remembered_documents(
    read: Sequence[int], history: Sequence[Remembered], form: Literal["release", "paper"]
) -> tuple[int, ...]:
    """What the memory keeps of the documents that a questioner with this history has read."""
    if form == "release":
        return tuple(read)
    known = {index for entry in history for index in entry.documents}
    return tuple(index for index in read if index not in known)


def widened(
    read: Sequence[int], history: Sequence[Remembered]
) -> list[tuple[Remembered | None, tuple[int, ...]]]:
    """How a context came about: each remembered question, oldest first, with the documents of `read` that it was the
    first to bring; at last None with the fresh ones."""
    left, steps = list(read), []
    for entry in (*history, None):
        brought = tuple(index for index in left if entry is None or index in entry.documents)
        left = [index for index in left if index not in brought]
        steps.append((entry, brought))
    return steps
