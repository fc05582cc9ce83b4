"""CUDA's flash kernel of variable lengths, as torch documents it, in float64 on a CPU: what `varlen` calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@contextmanager
def flash_kernel() -> Iterator[None]:
    """Inside, torch knows `_flash_attention_forward` and `_flash_attention_backward` for CPU tensors."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _sequences(q_ends: Tensor, k_ends: Tensor, longest: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    for ends, most in zip((q_ends, k_ends), longest, strict=True):
        assert ends.dtype == torch.int32 and ends[0] == 0
        assert max(b - a for a, b in pairwise(ends.tolist())) == most
    rows, keys = (list(pairwise(ends.tolist())) for ends in (q_ends, k_ends))
    for (q0, q1), (k0, k1) in zip(rows, keys, strict=True):
        yield slice(q0, q1), slice(k0, k1)


def _softmax_terms(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[heads, queries, keys]` in float64, and keys and values repeated for every query head."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if causal:  # aligned at the last query and key
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores, k, v


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int,
    dropout: float, causal: bool, debug: bool, *, scale: float, **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert dropout == 0.0 and not debug and q_ends[-1] == q.shape[0] and k_ends[-1] == k.shape[0]
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    for rows, keys in _sequences(q_ends, k_ends, (longest_q, longest_k)):
        scores, _, values = _softmax_terms(q[rows], k[keys], v[keys], causal, scale)
        lse[:, rows] = scores.logsumexp(-1).float()
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, nothing


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_ends: Tensor, k_ends: Tensor,
    longest_q: int, longest_k: int, dropout: float, causal: bool, state: Tensor, offset: Tensor, *,
    scale: float, **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert dropout == 0.0 and lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0])
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, keys in _sequences(q_ends, k_ends, (longest_q, longest_k)):
        scores, every_k, every_v = _softmax_terms(q[rows], k[keys], v[keys], causal, scale)
        weights = (scores - lse[:, rows].double()[..., None]).exp()
        part = grad[rows].double()
        d_scores = (
            torch.einsum("qhd,khd->hqk", part, every_v) - (part * out[rows].double()).sum(-1).t()[..., None]
        )
        d_scores = d_scores * weights * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", d_scores, every_k).to(q.dtype)
        for into, full in (
            (dk, torch.einsum("hqk,qhd->khd", d_scores, q[rows].double())),
            (dv, torch.einsum("hqk,qhd->khd", weights, part)),
        ):
            into[keys] = full.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)
    return dq, dk, dv
