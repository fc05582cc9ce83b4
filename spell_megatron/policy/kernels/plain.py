"""Attention by matrix products, a block of queries at a time, on any device and in any precision.

For float32 on CUDA, where no flash kernel goes: the toy model, and comparisons that float32 has to decide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spell_megatron.policy.spans import Pieces, Range

_BLOCK = 1024
"""Queries whose scores exist at the same time."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for block in _blocks(pieces):
        scores = _scores(q, k, block, pieces.causal, scale)
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse[..., None]).exp_()
        out = torch.einsum("kgqs,skd->qkgd", weights, v[block[2] : block[3]])
        yield slice(*block[:2]), out.flatten(1, 2), lse.flatten(0, 1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Pieces, scale: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    for block in _blocks(pieces):
        rows, keys = slice(*block[:2]), slice(*block[2:])
        weights = _scores(q, k, block, pieces.causal, scale)
        weights = weights.sub_(lse[:, rows].unflatten(0, (k.shape[1], -1))[..., None]).exp_()
        part, queries = _grouped(grad[rows], k), _grouped(q[rows], k)
        mean = (part * _grouped(out[rows], k)).sum(-1).permute(1, 2, 0)[..., None]
        d_scores = torch.einsum("qkgd,skd->kgqs", part, v[keys]).sub_(mean).mul_(weights).mul_(scale)
        dq = torch.einsum("kgqs,skd->qkgd", d_scores, k[keys]).flatten(1, 2)
        dk = torch.einsum("kgqs,qkgd->skd", d_scores, queries)
        dv = torch.einsum("kgqs,qkgd->skd", weights, part)
        yield rows, keys, dq, dk, dv


def _blocks(pieces: Pieces) -> Iterator[Range]:
    """Ranges of at most `_BLOCK` queries; of a causal one, with the keys up to the last that they see."""
    for q0, q1, k0, k1 in pieces.ranges:
        for first in range(q0, q1, _BLOCK):
            end = min(first + _BLOCK, q1)
            yield first, end, k0, k0 + end - q0 if pieces.causal else k1


def _scores(q: Tensor, k: Tensor, block: Range, causal: bool, scale: float) -> Tensor:
    """`[kv heads, queries per kv head, queries, keys]`, of keys that a query may not see -inf."""
    q0, q1, k0, k1 = block
    scores = torch.einsum("qkgd,skd->kgqs", _grouped(q[q0:q1], k), k[k0:k1]).mul_(scale)
    if causal:  # the last query sees every key
        hidden = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).triu_(
            k1 - k0 - (q1 - q0) + 1
        )
        scores.masked_fill_(hidden, -torch.inf)
    return scores


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """`[tokens, heads, d]` to `[tokens, kv heads, queries per kv head, d]`."""
    view: Tensor = x.unflatten(1, (keys.shape[1], -1))
    return view
