"""How new the questions are: against what is remembered of their cluster, and against each other.

Self-play that repeats itself in other words teaches nothing new, which neither reward nor length shows; R-Diverse keeps
an archive of questions for that. Similarity is that of the sets of words: it costs nothing and knows no paraphrase, so
this is a floor of how much repeats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from spell_megatron.selfplay.episode import Episode

_WORD = re.compile(r"\w+")


def novelty(text: str, known: Sequence[str]) -> float:
    """1 - the largest Jaccard similarity of a question's words to those of known ones; 1 where none is known."""
    words = _words(text)
    return 1.0 - max((_similarity(words, _words(other)) for other in known), default=0.0)


def novelties(episodes: Sequence[Episode]) -> list[float]:
    """The novelty of every question whose cluster has a history."""
    return [
        novelty(episode.question.text, [entry.question.text for entry in episode.history])
        for episode in episodes
        if episode.question and episode.history
    ]


def distinct_share(episodes: Sequence[Episode]) -> float | None:
    """Share of a step's questions that differ by more than the order and repetition of words; None without any."""
    questions = [_words(episode.question.text) for episode in episodes if episode.question]
    return len(set(questions)) / len(questions) if questions else None


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.casefold()))


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0
