"""The toy world: documents without end, questions about them, the truth, and worked examples."""

from spell_megatron.corpus.toy.transcripts import CLEAN, Habits, Mix, Transcript, restated, transcripts
from spell_megatron.corpus.toy.vocabulary import pieces
from spell_megatron.corpus.toy.world import (
    HELD_OUT,
    TASKS,
    TRAIN,
    Scale,
    heldout,
    plain,
    toy_cluster,
    toy_clusters,
    truth,
)

__all__ = [
    "CLEAN",
    "HELD_OUT",
    "TASKS",
    "TRAIN",
    "Habits",
    "Mix",
    "Scale",
    "Transcript",
    "heldout",
    "pieces",
    "plain",
    "restated",
    "toy_cluster",
    "toy_clusters",
    "transcripts",
    "truth",
]
