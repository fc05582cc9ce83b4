"""Log-probs and entropies of a batch's response tokens, put together from the ranks that computed them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch.distributed as dist

from spell_megatron.policy.world import World
from spell_megatron.types import TrainBatch

PerSample: TypeAlias = Sequence[Sequence[np.ndarray]]
"""`[group][sample]` -> float32 `[response tokens]`, aligned with a batch's groups."""
Row: TypeAlias = tuple[int, int, np.ndarray, np.ndarray, np.ndarray]
"""`(group, sample, places, log-probs, entropies)` of some tokens of a response."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probs and entropies of a batch's response tokens. Rank 0 has them; elsewhere there are no groups."""

    logprobs: PerSample = ()
    entropy: PerSample = ()

    def mean_entropy(self, labels: Sequence[str]) -> dict[str, float]:
        """In nats: over all response tokens as `policy/entropy`, and `<label>/entropy` over each label's groups."""
        by_label: dict[str, list[np.ndarray]] = {}
        for group, label in zip(self.entropy, labels, strict=True):
            by_label.setdefault(label, []).extend(group)
        whole = [sample for samples in by_label.values() for sample in samples]
        named = {"policy": whole, **by_label}
        return {
            f"{name}/entropy": float(np.concatenate(parts).mean()) for name, parts in named.items() if parts
        }


def gather(batch: TrainBatch, rows: Iterable[Row], world: World, *, everywhere: bool = False) -> Scores:
    """The scores that all ranks' rows make: on rank 0, or on every rank. A collective."""
    scores = Scores(_blank(batch), _blank(batch))
    for group, sample, places, logprobs, entropy in _of_all(list(rows), world, everywhere):
        scores.logprobs[group][sample][places] = logprobs
        scores.entropy[group][sample][places] = entropy
    return scores if everywhere or world.is_main else Scores()


def joined(places: Iterable[Sequence[int]], parts: Iterable[Scores]) -> Scores:
    """Scores of the parts of a batch as one; `places` are the groups that each part had."""
    every = [place for part in places for place in part]
    parts = list(parts)

    def ordered(groups: Iterable[Sequence[np.ndarray]]) -> PerSample:
        """Nothing where this rank has none."""
        return [group for _, group in sorted(zip(every, groups, strict=False), key=lambda pair: pair[0])]

    return Scores(
        ordered(group for scores in parts for group in scores.logprobs),
        ordered(group for scores in parts for group in scores.entropy),
    )


def _of_all(mine: list[Row], world: World, everywhere: bool) -> Iterator[Row]:
    everyone: list[Any] = [mine]
    if world.size > 1 and everywhere:
        everyone = [None] * world.size
        dist.all_gather_object(everyone, mine)
    elif world.size > 1:
        everyone = [None] * world.size if world.is_main else []
        dist.gather_object(mine, everyone if world.is_main else None)
    for rows in everyone:
        yield from rows


def _blank(batch: TrainBatch) -> PerSample:
    return [[np.full(len(s.tokens), np.nan, np.float32) for s in group.samples] for group in batch.groups]
