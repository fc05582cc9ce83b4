"""From a stream of groups to the tensors and ranges that one rank computes with.

A group lies in the stream as `[prompt | response 1 | … | response G]`: the prompt once, the position ids of
every response starting again at the prompt's length. A group of one response is a single causal span.

Context parallelism cuts every span into 2 x CP chunks and gives rank r the chunks r and 2 CP - 1 - r
("zigzag"), which balances causal attention. A rank predicts the tokens whose predecessor it holds, so no
hidden state travels. Spans are padded at their end to a multiple of 2 x CP; padded keys lie after every real
query of their span, and responses do not see the padding of their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from spell_megatron.policy.send import send
from spell_megatron.types import Tokens

if TYPE_CHECKING:
    from spell_megatron.policy.replay import Choices

Range = tuple[int, int, int, int]
"""Local queries [q0, q1) attend to stream keys [k0, k1)."""
Rows: TypeAlias = "slice | Tensor"
"""Rows of a tensor: a range, or their numbers."""


@dataclass(frozen=True)
class Pieces:
    """Ranges that one call of a kernel can take together: no two of them share a query, nor a key.

    Causal ones are square and aligned; in others every query sees every key.
    """

    causal: bool
    ranges: tuple[Range, ...]
    device: torch.device | str = "cpu"

    @cached_property
    def packed(self) -> Packed:
        """The same for a kernel of variable lengths, made once for all layers."""
        queries, query_bounds, longest_query = self._packed([(q0, q1) for q0, q1, _, _ in self.ranges])
        keys, key_bounds, longest_key = self._packed([(k0, k1) for _, _, k0, k1 in self.ranges])
        return Packed(queries, keys, (query_bounds, key_bounds, longest_query, longest_key))

    def _packed(self, ends: Sequence[tuple[int, int]]) -> tuple[Rows, Tensor, int]:
        """Rows of one side, cumulative lengths, the longest."""
        lengths = [end - first for first, end in ends]
        bounds = send(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), self.device)
        if all(end == first for (_, end), (first, _) in pairwise(ends)):
            return slice(ends[0][0], ends[-1][1]), bounds, max(lengths)
        rows = send(torch.cat([torch.arange(*pair) for pair in ends]), self.device)
        return rows, bounds, max(lengths)


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of queries and of keys, range after range, and where each range begins among them."""

    queries: Rows
    keys: Rows
    lengths: tuple[Tensor, Tensor, int, int]
    """Cumulative lengths of queries and keys, int32 `[ranges + 1]`; the longest of either."""


@dataclass(kw_only=True)
class SpanPlan(PackedSeqParams):
    """One rank's part of one stream. `qkv_format` is not "thd", so that megatron-core leaves tensors as
    `[tokens, 1, heads, d]` and applies the rotary embedding that the model hands it, token by token."""

    ids: Tensor
    """Token ids `[1, tokens / cp]`."""
    positions: Tensor
    """Position ids `[1, tokens / cp]`."""
    pieces: tuple[Pieces, ...]
    """What its queries attend to. Every query is in the first, which is causal."""
    rows: Tensor
    """Local rows whose hidden state predicts a response token, `[n]`."""
    targets: Tensor
    """The predicted tokens, `[n]`."""
    row_ids: np.ndarray
    """Where each predicted token stands among the stream's response tokens, `[n]`; on the host."""
    response_ids: np.ndarray
    """Which of the stream's responses it belongs to, `[n]`; on the host."""
    first_rows: int
    """How many of the local rows predict the first token of a response."""
    sources: np.ndarray
    """Which token every local row is, counted through prompts and responses as they are given, `[tokens / cp]`; -1
    for padding."""
    choices: Choices | None = None
    """What the engine's routers chose for the rows, where the learner's are to choose the same."""
    attended: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By number of the layer: what attention found in the forward pass, where the backward pass is to begin with it."""
    to_stream: Tensor | None = None
    """Order of the stream's tokens among those gathered rank by rank, `[tokens]`; None without CP."""
    from_stream: Tensor | None = None
    """The inverse of `to_stream`."""


@dataclass(slots=True)
class _Span:
    start: int
    length: int
    prompt: tuple[int, int] = (0, 0)
    """Range of keys that every query of the span sees in full, before its own."""


@dataclass(slots=True)
class _Layout:
    """A stream while it is laid out, on the host."""

    unit: int
    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    sources: list[np.ndarray] = field(default_factory=list)
    spans: list[_Span] = field(default_factory=list)
    length: int = 0
    tokens: int = 0
    """Without padding."""

    def add(self, tokens: np.ndarray, first_position: int, prompt: tuple[int, int] = (0, 0)) -> int:
        start, padded = self.length, -(-len(tokens) // self.unit) * self.unit
        padding = (0, padded - len(tokens))
        self.ids.append(np.pad(tokens, padding))
        self.positions.append(np.arange(first_position, first_position + padded))
        self.sources.append(
            np.pad(np.arange(self.tokens, self.tokens + len(tokens)), padding, constant_values=-1)
        )
        self.spans.append(_Span(start, padded, prompt))
        self.length += padded
        self.tokens += len(tokens)
        return start


def plan_spans(
    groups: Sequence[tuple[Tokens, Sequence[Tokens]]],
    *,
    cp_size: int = 1,
    cp_rank: int = 0,
    multiple: int = 1,
    device: torch.device | str = "cpu",
) -> SpanPlan:
    """Lay out `(prompt, responses)` groups for one context-parallel rank.

    The local length is a multiple of `multiple`: of the TP size under sequence parallelism, say.
    """
    layout = _Layout(unit=2 * cp_size if cp_size > 1 else 1)
    predecessors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    rectangles: list[tuple[int, int, tuple[int, int]]] = []
    for prompt_ids, responses in groups:
        prompt = np.asarray(prompt_ids, dtype=np.int64)
        replies = [np.asarray(response, dtype=np.int64) for response in responses]
        targets += replies
        if len(replies) == 1:
            start = layout.add(np.concatenate((prompt, replies[0])), 0)
            predecessors.append(start + len(prompt) - 1 + np.arange(len(replies[0])))
            continue
        start = layout.add(prompt, 0)
        keys, first = (start, start + len(prompt)), len(layout.spans)
        for reply in replies:
            if not len(reply):  # a model may end at once: nothing to predict
                continue
            own = layout.add(reply, len(prompt), keys)
            predecessors.append(np.concatenate(([keys[1] - 1], own + np.arange(len(reply) - 1))))
        if len(layout.spans) > first:
            rectangles.append((first, len(layout.spans), keys))
    _pad_to_multiple(layout, cp_size * multiple)

    ids, positions = np.concatenate(layout.ids), np.concatenate(layout.positions)
    local = [_local_chunks(layout.spans, cp_size, rank) for rank in range(cp_size)]
    order = [np.concatenate([np.arange(a, b) for _, a, b in chunks]) for chunks in local]
    mine = order[cp_rank]
    at = np.full(layout.length, -1)
    at[mine] = np.arange(len(mine))

    before = np.concatenate(predecessors) if predecessors else np.zeros(0, dtype=np.int64)
    held = at[before] >= 0
    lengths = [len(target) for target in targets]
    starts = np.zeros(len(before), dtype=bool)
    starts[[end - length for end, length in zip(accumulate(lengths), lengths, strict=True) if length]] = True

    def tensor(array: np.ndarray) -> Tensor:
        return send(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)), device)

    to_stream = from_stream = None
    if cp_size > 1:
        by_rank = np.concatenate(order)
        from_stream, to_stream = tensor(by_rank), tensor(np.argsort(by_rank))
    return SpanPlan(
        qkv_format="spans",
        ids=tensor(ids[mine])[None],
        positions=tensor(positions[mine])[None],
        pieces=_pieces(layout.spans, local[cp_rank], rectangles, device),
        rows=tensor(at[before[held]]),
        targets=tensor(np.concatenate(targets)[held] if targets else before),
        row_ids=np.flatnonzero(held),
        response_ids=np.repeat(np.arange(len(lengths)), lengths)[held],
        first_rows=int((starts & held).sum()),
        sources=np.concatenate(layout.sources)[mine],
        to_stream=to_stream,
        from_stream=from_stream,
    )


def _pad_to_multiple(layout: _Layout, multiple: int) -> None:
    """Grow the last span (or make one of padding alone) until the stream divides by `multiple`."""
    extra = 0
    if not layout.spans:
        layout.spans.append(_Span(0, 0))
        extra = layout.unit
    while (layout.length + extra) % multiple:
        extra += layout.unit
    position = layout.positions[-1][-1] + 1 if layout.positions else 0
    layout.ids.append(np.zeros(extra, dtype=np.int64))
    layout.positions.append(np.arange(position, position + extra))
    layout.sources.append(np.full(extra, -1))
    layout.spans[-1].length += extra
    layout.length += extra


def _local_chunks(spans: Sequence[_Span], cp_size: int, rank: int) -> list[tuple[int, int, int]]:
    """`(span, first, end)` of every chunk of the stream that a rank holds, in its local order."""
    if cp_size == 1:
        return [(i, span.start, span.start + span.length) for i, span in enumerate(spans)]
    chunks = []
    for i, span in enumerate(spans):
        size = span.length // (2 * cp_size)
        for chunk in (rank, 2 * cp_size - 1 - rank):
            first = span.start + chunk * size
            chunks.append((i, first, first + size))
    return chunks


def _pieces(
    spans: Sequence[_Span],
    chunks: Sequence[tuple[int, int, int]],
    rectangles: Sequence[tuple[int, int, tuple[int, int]]],
    device: torch.device | str,
) -> tuple[Pieces, ...]:
    """Own chunk, causal; own earlier chunks, of a span's first chunk here and of its second; prompts, full."""
    own: list[Range] = []
    earlier: tuple[list[Range], list[Range]] = ([], [])
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    query = 0
    for i, first, end in chunks:
        here = (query, query + end - first)
        own.append((*here, first, end))
        if first > spans[i].start:
            earlier[i in begins].append((*here, spans[i].start, first))
        begins.setdefault(i, query)
        query = ends[i] = here[1]
    prompts = [(begins[a], ends[b - 1], *keys) for a, b, keys in rectangles]
    full = [Pieces(False, tuple(ranges), device) for ranges in (*earlier, prompts) if ranges]
    return Pieces(True, tuple(own), device), *full
