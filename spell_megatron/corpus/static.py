"""Fixed questions instead of the questioner's: what static reinforcement learning trains on (an ablation)."""

from __future__ import annotations

import random
from typing import Any, Protocol

from spell_megatron.corpus.worlds import WORLDS, world_of
from spell_megatron.types import Cluster, Question, SpellError


class Sampler(Protocol):
    def draw(self, n: int) -> list[tuple[Cluster, Any]]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class StaticQuestions:
    """Clusters with one question each out of its world's generator, the same whenever they come again."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def draw(self, n: int) -> list[tuple[Cluster, Question]]:
        return [(cluster, _question(cluster, task)) for cluster, task in self._sampler.draw(n)]

    def state(self) -> dict[str, Any]:
        return self._sampler.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._sampler.restore(state)


def _question(cluster: Cluster, task: str) -> Question:
    world = world_of(cluster.id)
    question = world.ask(cluster.documents, task, random.Random(f"{cluster.id}/{task}")) if world else None
    if question is None:
        raise SpellError(
            f"cluster {cluster.id} has no fixed question for {task}: selfplay.static_questions works on the"
            f" generated worlds alone ({', '.join(WORLDS)}); set corpus.sources to one, or static_questions=false"
        )
    return question
