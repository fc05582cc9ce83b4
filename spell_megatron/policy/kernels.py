"""One flash-attention call on one piece, for each device. The only attention code that differs by device.

A piece is a query range against a key range, either full (no mask) or causal and square. All tensors are
views `[heads, tokens, head_dim]`; with grouped queries, `heads` of the keys divides that of the queries.
The log-sum-exp is float32 `[heads, tokens]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spell_megatron.policy.spans import Piece

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_forward = torch.ops.aten._flash_attention_forward
_cuda_backward = torch.ops.aten._flash_attention_backward
_HALVED, _WHOLE = range(768, 2049), 256
"""Tokens of a causal piece that the CPU kernel's backward call is given in halves, down to pieces of so many."""


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[heads, tokens, head_dim]` and log-sum-exp of one piece."""
    if q.is_cuda:
        lengths = (q.shape[1], k.shape[1])
        q, k, v = _tokens_first(q), _tokens_first(k), _tokens_first(v)
        out, lse, *_ = _cuda_forward(q, k, v, None, None, *lengths, 0.0, causal, False, scale=scale)
        return out[0].transpose(0, 1), lse[0]
    out, lse = _cpu_forward(_grouped(q, k), _shared(k, q), _shared(v, q), 0.0, causal, scale=scale)
    return out.flatten(0, 1), lse.flatten(0, 1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one piece. `out` and `lse` may be those of a merge of several pieces that contain this
    one: the softmax of the piece is recomputed from `lse`, which makes the sum over pieces exact."""
    if q.is_cuda:
        none = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is off
        grads = _cuda_backward(
            _tokens_first(grad),
            _tokens_first(q),
            _tokens_first(k),
            _tokens_first(v),
            _tokens_first(out),
            lse[None].contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            none,
            none,
            scale=scale,
        )
        dq, dk, dv = (g[0].transpose(0, 1) for g in grads)
        return dq, dk, dv
    dq, dk, dv = _cpu_backward(
        _grouped(grad, k),
        _grouped(q, k),
        _shared(k, q),
        _shared(v, q),
        _grouped(out, k),
        lse.unflatten(0, (k.shape[0], -1)),
        0.0,
        causal,
        scale=scale,
    )
    return dq.flatten(0, 1), dk.sum(1), dv.sum(1)


def causal_blocks(tokens: int, *, cuda: bool) -> Iterator[Piece]:
    """A causal piece in those, counted from its start, whose backward calls take least time.

    The CPU kernel's own blocks are so long that a fifth of its work lies above the diagonal: it is given two
    causal halves, and all that the later one sees of the earlier (`python -m benchmarks.trainer`).
    """
    if not cuda and tokens in _HALVED:
        yield from _halves(0, tokens)
    else:
        yield 0, tokens, 0, tokens, True


def _halves(start: int, end: int) -> Iterator[Piece]:
    if end - start <= _WHOLE:
        yield start, end, start, end, True
        return
    middle = (start + end) // 2
    yield from _halves(start, middle)
    yield middle, end, start, middle, False
    yield from _halves(middle, end)


def _tokens_first(x: Tensor) -> Tensor:
    """`[heads, tokens, d]` to `[1, tokens, heads, d]`: the layout of the CUDA kernel."""
    return x.transpose(0, 1)[None]


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """`[heads, tokens, d]` to `[kv heads, queries per kv head, tokens, d]`, without a copy."""
    return x.unflatten(0, (keys.shape[0], -1))


def _shared(x: Tensor, queries: Tensor) -> Tensor:
    """`[kv heads, tokens, d]` to the same layout, every query of a group seeing the same memory."""
    return x[:, None].expand(-1, queries.shape[0] // x.shape[0], -1, -1)
