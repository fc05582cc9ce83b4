"""The toy world: documents without end, questions about them, the truth, and worked examples."""

from spell_megatron.corpus.toy.transcripts import (
    CLEAN,
    HABITS,
    Habits,
    Mix,
    Transcript,
    choices,
    restated,
    transcripts,
)
from spell_megatron.corpus.toy.vocabulary import pieces
from spell_megatron.corpus.toy.world import (
    HELD_OUT,
    TASKS,
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
    "CLEAN",
    "HABITS",
    "HELD_OUT",
    "TASKS",
    "TRAIN",
    "WHOLE",
    "Habits",
    "Mix",
    "Scale",
    "Transcript",
    "ask",
    "choices",
    "heldout",
    "pieces",
    "plain",
    "restated",
    "toy_cluster",
    "toy_clusters",
    "transcripts",
    "truth",
]
