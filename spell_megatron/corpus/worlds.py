"""The generated worlds: corpora without end whose truth is known. A source or a held-out set names one as its path."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from spell_megatron.corpus import hard, toy
from spell_megatron.corpus.toy.world import Derived
from spell_megatron.types import Cluster, Document, Question, SpellError


@dataclass(frozen=True)
class GeneratedWorld:
    """What is generated, asked and known."""

    name: str
    cluster: Callable[[int, int], Cluster]
    """`(seed, index)`: of the training half, and the same for the same numbers."""
    ask: Callable[[Sequence[Document], str, Random], Question | None]
    """A question of a task about some documents, with a true reference; None where they answer none."""
    heldout: Callable[[int, int], list[tuple[Cluster, Question]]]
    """`(count, seed)`: questions on clusters of the other half, with which training has nothing in common."""
    truth: Callable[[Cluster, Question], str | None]
    """The right answer in its plain form, a letter where there are options; None where there is none."""
    plain: Callable[[str], str]
    """The bare value in an answer."""
    reach: Callable[[Cluster, Question], hard.Solution | None] = lambda cluster, question: None
    """What a question needs of its cluster; None where that is not known."""


def _question(found: Derived | hard.Asked | None) -> Question | None:
    return found.question if found else None


def _toy() -> GeneratedWorld:
    def ask(documents: Sequence[Document], task: str, rng: Random) -> Question | None:
        return _question(toy.ask(documents, task, rng))

    return GeneratedWorld("toy", toy.toy_cluster, ask, toy.heldout, toy.truth, toy.plain)


def _hard(name: str, scale: hard.Extent) -> GeneratedWorld:
    def drawn(half: int, seed: int, index: int, times: int = 1) -> Cluster:
        return hard.cluster(f"{name}-{seed}-{half}-{index}", name, half, replace(scale, times=times))

    def ask(documents: Sequence[Document], task: str, rng: Random) -> Question | None:
        return _question(hard.ask(documents, task, rng))

    def heldout(count: int, seed: int) -> list[tuple[Cluster, Question]]:
        return list(hard.heldout(count, lambda index, times: drawn(hard.HELD_OUT, seed, index, times)))

    def cluster(seed: int, index: int) -> Cluster:
        return drawn(hard.TRAIN, seed, index)

    return GeneratedWorld(name, cluster, ask, heldout, hard.truth, hard.plain, hard.reach)


WORLDS = {world.name: world for world in (_toy(), _hard("hard", hard.FULL), _hard("hard-small", hard.SMALL))}
_NUMBERED = re.compile(r"(?P<world>.+)-(?P<seed>-?\d+)-0-(?P<index>\d+)")


def world_of(identity: str) -> GeneratedWorld | None:
    """The world that made a cluster of the training half, by the cluster's id; None where none did."""
    met = _NUMBERED.fullmatch(identity)
    return WORLDS.get(met["world"]) if met else None


def recalled(identity: str) -> tuple[GeneratedWorld, Cluster]:
    """The world and the whole of a cluster of the training half, by its id. Raises SpellError where none made it."""
    met, world = _NUMBERED.fullmatch(identity), world_of(identity)
    if met is None or world is None:
        raise SpellError(
            f"{identity} is no cluster of a generated world; those are called WORLD-SEED-0-INDEX"
        )
    return world, world.cluster(int(met["seed"]), int(met["index"]))
