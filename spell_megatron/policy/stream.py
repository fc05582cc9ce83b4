"""From a batch to microbatches: groups packed into streams, streams dealt to data-parallel ranks. Pure.

A stream is what one forward and backward pass computes. It is filled to a token budget; work is balanced
by an estimate that counts attention's quadratic part; and every rank gets the same number of streams, since
the collectives of a step must match. What a batch's loss and gradients are does not depend on any of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from spell_megatron.types import Group, Sample, SpellError, Tokens, TrainBatch


@dataclass(frozen=True, slots=True)
class Part:
    """Some samples of one group, which share one copy of the prompt."""

    group: int
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """Parts laid end to end. An empty stream keeps a rank in step with the others and trains nothing."""

    parts: tuple[Part, ...] = ()

    def layout(self, batch: TrainBatch) -> list[tuple[Tokens, list[Tokens]]]:
        """`(prompt, responses)` of every part."""
        groups = batch.groups
        return [
            (groups[part.group].prompt, [groups[part.group].samples[i].tokens for i in part.samples])
            for part in self.parts
        ]

    def samples(self, batch: TrainBatch) -> Iterator[tuple[int, int, Sample]]:
        """`(group, index, sample)` in the order of the stream's responses."""
        for part in self.parts:
            for i in part.samples:
                yield part.group, i, batch.groups[part.group].samples[i]


@dataclass(frozen=True, slots=True)
class _Load:
    part: Part
    tokens: int
    work: float


def plan_streams(
    batch: TrainBatch,
    *,
    budget: int,
    data_size: int = 1,
    multiple: int = 1,
    share_prompts: bool = True,
    token_work: float = 1000.0,
) -> list[list[Stream]]:
    """Streams of every data-parallel rank: as many on each, that number being a multiple of `multiple`.

    `token_work` is the cost of a token's linear layers in units of one query-key pair.
    """
    loads = [
        load
        for index, group in enumerate(batch.groups)
        for load in _split(index, group, budget if share_prompts else 0, token_work)
    ]
    longest = max((load.tokens for load in loads), default=0)
    if longest > budget:
        raise SpellError(
            f"a sequence of {longest} tokens does not fit a stream of policy.stream_tokens={budget}:"
            " raise it, or lower the prompt and response limits"
        )
    step = data_size * multiple
    fewest = max(1, -(-sum(load.tokens for load in loads) // budget))
    counts = range(_round_up(fewest, step), _round_up(max(fewest, len(loads)), step) + 1, step)
    # The fewest streams that hold all: with one for every load they do.
    count = counts[bisect_left(counts, True, key=lambda n: _fill(loads, n, budget) is not None)]
    bins = _fill(loads, count, budget)
    assert bins is not None  # the search ended on it
    bins.sort(key=lambda loads: -sum(load.work for load in loads))
    ranks: list[list[Stream]] = [[] for _ in range(data_size)]
    for start in range(0, count, data_size):
        row = bins[start : start + data_size]
        # Snake order: who got the heaviest of one row gets the lightest of the next.
        for rank, loads_of_stream in zip(
            ranks, row if (start // data_size) % 2 == 0 else row[::-1], strict=True
        ):
            rank.append(Stream(tuple(load.part for load in loads_of_stream)))
    return ranks


def _split(index: int, group: Group, budget: int, token_work: float) -> Iterator[_Load]:
    """A group as one part, or as several that each repeat the prompt where it exceeds the budget."""
    prompt = total = len(group.prompt)
    chosen: list[int] = []
    for i, sample in enumerate(group.samples):
        if chosen and total + len(sample.tokens) > budget:
            yield _load(index, group, chosen, token_work)
            chosen, total = [], prompt
        chosen.append(i)
        total += len(sample.tokens)
    if chosen:
        yield _load(index, group, chosen, token_work)


def _load(index: int, group: Group, chosen: Sequence[int], token_work: float) -> _Load:
    prompt, replies = len(group.prompt), [len(group.samples[i].tokens) for i in chosen]
    tokens = prompt + sum(replies)
    pairs = prompt * prompt / 2 + sum(reply * (prompt + reply / 2) for reply in replies)
    return _Load(Part(index, tuple(chosen)), tokens, token_work * tokens + pairs)


def _fill(loads: Sequence[_Load], count: int, budget: int) -> list[list[_Load]] | None:
    """Heaviest first, each to the least loaded stream with room; None where some load finds none."""
    bins: list[list[_Load]] = [[] for _ in range(count)]
    tokens, work = np.zeros(count, np.int64), np.zeros(count)
    for load in sorted(loads, key=lambda load: -load.work):
        has_room = tokens + load.tokens <= budget
        if not has_room.any():
            return None
        best = int(np.where(has_room, work, np.inf).argmin())
        bins[best].append(load)
        tokens[best] += load.tokens
        work[best] += load.work
    return bins


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
