"""Packing and span plans: pure arithmetic, checked against brute force."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.policy.spans import SpanPlan, plan_spans
from spell_megatron.policy.stream import plan_streams
from spell_megatron.types import Group, Sample, SpellError, TrainBatch

pytestmark = pytest.mark.unit

Shape = tuple[int, tuple[int, ...]]
shapes = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple)),
    min_size=1,
    max_size=6,
)


def batch_of(sizes: list[Shape]) -> TrainBatch:
    """Every token of the batch is a different number, so that each can be traced."""
    numbers = iter(range(1, 10**6))

    def tokens(n: int) -> list[int]:
        return [next(numbers) for _ in range(n)]

    return TrainBatch(
        tuple(
            Group(tokens(prompt), tuple(Sample(t := tokens(n), [1.0] * len(t)) for n in replies))
            for prompt, replies in sizes
        )
    )


@settings(max_examples=60)
@given(shapes, st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_every_sample_is_in_one_stream_within_the_budget(
    sizes: list[Shape], data_size: int, multiple: int, share: bool
) -> None:
    batch, budget = batch_of(sizes), 64
    ranks = plan_streams(batch, budget=budget, data_size=data_size, multiple=multiple, share_prompts=share)
    counts = {len(streams) for streams in ranks}
    assert len(ranks) == data_size
    assert len(counts) == 1
    assert counts.pop() % multiple == 0
    seen = []
    for streams in ranks:
        for stream in streams:
            layout = stream.layout(batch)
            assert sum(len(p) + sum(map(len, replies)) for p, replies in layout) <= budget
            assert share or all(len(replies) == 1 for _, replies in layout)
            seen += [(group, i) for group, i, _ in stream.samples(batch)]
    assert sorted(seen) == [(g, i) for g, (_, replies) in enumerate(sizes) for i in range(len(replies))]


def test_a_sequence_beyond_the_budget_is_refused_with_the_key_to_change() -> None:
    with pytest.raises(SpellError, match=r"policy\.stream_tokens=10"):
        plan_streams(batch_of([(9, (3,))]), budget=10)


def test_a_stream_is_filled_to_its_last_token_and_no_further() -> None:
    batch = batch_of([(30, (3,)), (29, (3,))])
    assert [len(plan_streams(batch, budget=budget)[0]) for budget in (64, 65)] == [2, 1]


def test_work_is_balanced_by_its_quadratic_part() -> None:
    """One long sequence outweighs many short ones of as many tokens."""
    batch = batch_of([(400, (8,)), *[(16, (4,))] * 20])
    ranks = plan_streams(batch, budget=1000, data_size=2, token_work=0.0)
    holders = [{group for stream in rank for group, *_ in stream.samples(batch)} for rank in ranks]
    assert {0} in holders


def visible(plans: list[SpanPlan]) -> dict[int, set[int]]:
    """For every real query token, the real tokens that it attends to, over all context-parallel ranks."""
    if plans[0].to_stream is None:
        stream = plans[0].ids[0]
    else:
        stream = torch.cat([plan.ids[0] for plan in plans])[plans[0].to_stream]
    seen: dict[int, set[int]] = {}
    for plan in plans:
        for pieces, (q0, q1, k0, k1) in ((p, ranges) for p in plan.pieces for ranges in p.ranges):
            causal = pieces.causal
            assert not causal or q1 - q0 == k1 - k0
            for q in range(q0, q1):
                last = k0 + (q - q0) + 1 if causal else k1
                keys = {int(t) for t in stream[k0:last] if t}
                query = int(plan.ids[0, q])
                if query:
                    before = seen.setdefault(query, set())
                    assert not before & keys, "a key is counted twice"
                    before |= keys
    return seen


@settings(max_examples=40)
@given(shapes, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 16]))
def test_pieces_are_causal_attention_over_prompt_and_own_response(
    sizes: list[Shape], cp: int, multiple: int
) -> None:
    batch = batch_of(sizes)
    groups = [(g.prompt, [s.tokens for s in g.samples]) for g in batch.groups]
    plans = [plan_spans(groups, cp_size=cp, cp_rank=rank, multiple=multiple) for rank in range(cp)]
    expected: dict[int, set[int]] = {}
    positions: dict[int, int] = {}
    for prompt, replies in groups:
        for i, token in enumerate(prompt):
            expected[token], positions[token] = set(prompt[: i + 1]), i
        for reply in replies:
            for i, token in enumerate(reply):
                expected[token] = {*prompt, *reply[: i + 1]}
                positions[token] = len(prompt) + i
    assert visible(plans) == expected
    for plan in plans:
        assert plan.ids.shape[1] % multiple == 0
        for token, position in zip(plan.ids[0].tolist(), plan.positions[0].tolist(), strict=True):
            assert not token or positions[token] == position


@settings(max_examples=40)
@given(shapes, st.sampled_from([1, 2, 4]))
def test_pieces_that_go_together_share_no_query_and_no_key(sizes: list[Shape], cp: int) -> None:
    groups = [(g.prompt, [s.tokens for s in g.samples]) for g in batch_of(sizes).groups]
    for plan in (plan_spans(groups, cp_size=cp, cp_rank=rank) for rank in range(cp)):
        first, *others = plan.pieces
        assert first.causal
        assert first.packed.queries == slice(0, plan.ids.shape[1])
        assert not any(pieces.causal for pieces in others)
        for pieces in plan.pieces:
            for a, b in ((0, 1), (2, 3)):
                rows = [row for ends in pieces.ranges for row in range(ends[a], ends[b])]
                assert len(set(rows)) == len(rows)


@settings(max_examples=40)
@given(shapes, st.sampled_from([1, 2, 4]))
def test_every_response_token_is_predicted_once_from_its_predecessor(sizes: list[Shape], cp: int) -> None:
    batch = batch_of(sizes)
    groups = [(g.prompt, [s.tokens for s in g.samples]) for g in batch.groups]
    pairs, ids, responses, firsts = [], [], [], 0
    for rank in range(cp):
        plan = plan_spans(groups, cp_size=cp, cp_rank=rank)
        pairs += zip(plan.ids[0, plan.rows].tolist(), plan.targets.tolist(), strict=True)
        ids += plan.row_ids.tolist()
        responses += list(zip(plan.row_ids.tolist(), plan.response_ids.tolist(), strict=True))
        firsts += plan.first_rows
    replies = [(prompt, reply) for prompt, all_replies in groups for reply in all_replies]
    assert sorted(pairs) == sorted(
        pair for prompt, reply in replies for pair in pairwise([prompt[-1], *reply])
    )
    assert sorted(ids) == list(range(batch.response_tokens))
    bounds = list(accumulate((len(reply) for _, reply in replies), initial=0))
    assert all(bounds[response] <= row < bounds[response + 1] for row, response in responses)
    assert firsts == len(replies)


def test_shared_prompts_cost_p_plus_gr_tokens() -> None:
    [(prompt, replies)] = [(list(range(1, 101)), [list(range(200, 210))] * 8)]
    assert plan_spans([(prompt, replies)]).ids.shape[1] == 100 + 8 * 10


def test_an_empty_stream_predicts_nothing() -> None:
    plan = plan_spans([], cp_size=2, cp_rank=1, multiple=2)
    assert plan.rows.numel() == 0
    assert plan.ids.shape[1] > 0
    assert np.array_equal(plan.targets.numpy(), np.zeros(0))
