"""The toy world: documents without end, questions about them, the truth, and worked examples."""

from spell_megatron.corpus.templates import TASKS
from spell_megatron.corpus.toy.transcripts import DEMONSTRATIONS, HABITS
from spell_megatron.corpus.toy.world import (
    HELD_OUT,
    TRAIN,
    WHOLE,
    Scale,
    ask,
    heldout,
    plain,
    toy_cluster,
    toy_clusters,
    truth,
)

__all__ = [
    "DEMONSTRATIONS",
    "HABITS",
    "HELD_OUT",
    "TASKS",
    "TRAIN",
    "WHOLE",
    "Scale",
    "ask",
    "heldout",
    "plain",
    "toy_cluster",
    "toy_clusters",
    "truth",
]
