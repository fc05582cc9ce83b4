"""How a step's batch falls on the data-parallel ranks: evenly, or as the learner packs it into streams. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from spell_megatron.config import Config, SelfPlayConfig
from spell_megatron.policy.layout import WorldShape
from spell_megatron.policy.stream import Stream as PackedStream
from spell_megatron.policy.stream import plan_streams
from spell_megatron.tools.plan.workload import (
    Lengths,
    Work,
    batch_work,
    expected_batch,
    forward_work,
    group_lengths,
)
from spell_megatron.types import TrainBatch
from spell_megatron.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Deal:
    """How the batch falls on data-parallel ranks. `tokens` and predicted `rows` are the busiest one's."""

    streams: int
    busiest: Work
    tokens: float
    rows: float


def packed(config: Config, shape: ModelShape, world: WorldShape, lengths: Lengths) -> Deal:
    """As the learner packs and deals the batch; takes seconds for long texts."""
    policy = config.policy
    multiple = policy.layout.pipeline if policy.layout.virtual_pipeline else 1
    return _dealt(
        config.selfplay, lengths, shape, policy.stream_tokens, world.data, multiple, policy.share_prompts
    )


def even(config: Config, shape: ModelShape, world: WorldShape, lengths: Lengths, *, shared: bool) -> Deal:
    """In perfect balance and without a gap in any stream."""
    pairs = list(group_lengths(expected_batch(config.selfplay, lengths)))
    work = batch_work(shape, pairs, shared=shared)
    rows = sum(sum(replies) for _, replies in pairs) / world.data
    tokens = (
        sum(prompt * (1 if shared else len(replies)) + sum(replies) for prompt, replies in pairs) / world.data
    )
    return Deal(math.ceil(tokens / config.policy.stream_tokens), work.over(world.data), tokens, rows)


@cache
def _dealt(
    play: SelfPlayConfig,
    lengths: Lengths,
    shape: ModelShape,
    budget: int,
    data: int,
    multiple: int,
    shared: bool,
) -> Deal:
    batch = expected_batch(play, lengths)
    ranks = plan_streams(
        batch,
        budget=max(budget, _longest(batch)),
        data_size=data,
        multiple=multiple,
        share_prompts=shared,
        token_work=forward_work(shape, 1, 0, 0).total / forward_work(shape, 0, 1, 0).total,
    )
    busiest, tokens, rows = Work(0, 0, 0), 0.0, 0.0
    for rank in ranks:
        pairs = [pair for stream in rank for pair in _lengths(stream, batch)]
        work = batch_work(shape, pairs, shared=True)
        if work.total > busiest.total:
            busiest = work
        tokens = max(tokens, sum(prompt + sum(replies) for prompt, replies in pairs))
        rows = max(rows, sum(sum(replies) for _, replies in pairs))
    return Deal(len(ranks[0]), busiest, tokens, rows)


def _lengths(stream: PackedStream, batch: TrainBatch) -> list[tuple[int, list[int]]]:
    return [(len(prompt), [len(reply) for reply in replies]) for prompt, replies in stream.layout(batch)]


def _longest(batch: TrainBatch) -> int:
    return max(len(group.prompt) + max(len(s.tokens) for s in group.samples) for group in batch.groups)
