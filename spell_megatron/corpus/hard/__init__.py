"""The hard world: long clusters with chains, sums, comparisons, look-alikes and keys; endless, and the truth known."""

from spell_megatron.corpus.hard.asking import (
    LENGTHS,
    LINKS_ASKED,
    PARAPHRASED,
    Asked,
    ask,
    heldout,
    reach,
    truth,
)
from spell_megatron.corpus.hard.reading import Solution, plain
from spell_megatron.corpus.hard.vocabulary import vocabulary
from spell_megatron.corpus.hard.world import FULL, HELD_OUT, SMALL, TRAIN, Extent, cluster
from spell_megatron.corpus.templates import TASKS

__all__ = [
    "FULL",
    "HELD_OUT",
    "LENGTHS",
    "LINKS_ASKED",
    "PARAPHRASED",
    "SMALL",
    "TASKS",
    "TRAIN",
    "Asked",
    "Extent",
    "Solution",
    "ask",
    "cluster",
    "heldout",
    "plain",
    "reach",
    "truth",
    "vocabulary",
]
