"""What a questioner reads, and where a correct choice has to stand.

With a history the questioner reads every document that a remembered question was asked about, and `m`
fresh ones: the context, and with it the reach of the questions, grows with each success up to the
whole cluster, until the ring of the memory forgets the oldest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from spell_megatron.selfplay.memory import Remembered
from spell_megatron.selfplay.parsing import LETTERS


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


def choose_key(random: random.Random) -> str:
    """The letter of the correct choice, uniform, so that the keys stay balanced."""
    return random.choice(LETTERS)
