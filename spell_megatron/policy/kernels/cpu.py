"""torch's CPU flash kernel, range by range."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_patches.cpu_products import mkl_is_slow
from spell_megatron.policy.spans import Pieces, Range

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_HALVED, _WHOLE = range(768, 2049), 256
"""Tokens of a causal range whose backward call is made in halves, down to ranges of so many, where MKL is slow."""
_KEY_BLOCK = 16_384
"""Keys of one backward call: with grouped queries the kernel makes a gradient of the keys for every query head
before it sums them, which over a whole stream would outweigh all else that a context-parallel rank holds."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for q0, q1, k0, k1 in pieces.ranges:
        rows, keys = slice(q0, q1), slice(k0, k1)
        out, lse = _forward(
            _grouped(q[rows], k), _shared(k[keys], q), _shared(v[keys], q), 0.0, pieces.causal, scale=scale
        )
        yield rows, _tokens_first(out), lse.flatten(0, 1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Pieces, scale: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    for (q0, q1, k0, k1), causal in _blocks(pieces):
        rows, keys = slice(q0, q1), slice(k0, k1)
        dq, dk, dv = _backward(
            _grouped(grad[rows], k),
            _grouped(q[rows], k),
            _shared(k[keys], q),
            _shared(v[keys], q),
            _grouped(out[rows], k),
            lse[:, rows].unflatten(0, (k.shape[1], -1)),
            0.0,
            causal,
            scale=scale,
        )
        yield rows, keys, _tokens_first(dq), dk.sum(1).transpose(0, 1), dv.sum(1).transpose(0, 1)


def _blocks(pieces: Pieces) -> Iterator[tuple[Range, bool]]:
    """Ranges as the backward kernel wants them, and whether each is causal: gradients are sums, whatever the cut."""
    for q0, q1, k0, k1 in pieces.ranges:
        if not pieces.causal:
            for first in range(k0, k1, _KEY_BLOCK):
                yield (q0, q1, first, min(first + _KEY_BLOCK, k1)), False
        elif mkl_is_slow() and q1 - q0 in _HALVED:
            yield from _halves(q0, q1, k0)
        else:
            yield (q0, q1, k0, k1), True


def _halves(q0: int, q1: int, k0: int) -> Iterator[tuple[Range, bool]]:
    """A causal range as two, and all that the later one sees of the earlier.

    The kernel's own blocks are so long that a fifth of its work lies above the diagonal. Where MKL is fast, that
    takes less than the further calls do (`python -m benchmarks.trainer`).
    """
    tokens = q1 - q0
    if tokens <= _WHOLE:
        yield (q0, q1, k0, k0 + tokens), True
        return
    half = tokens // 2
    yield from _halves(q0, q0 + half, k0)
    yield (q0 + half, q1, k0, k0 + half), False
    yield from _halves(q0 + half, q1, k0 + half)


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """`[tokens, heads, d]` to `[kv heads, queries per kv head, tokens, d]`, without a copy."""
    view: Tensor = x.transpose(0, 1).unflatten(0, (keys.shape[1], -1))
    return view


def _shared(x: Tensor, queries: Tensor) -> Tensor:
    """`[tokens, kv heads, d]` to the same layout, every query of a group seeing the same memory."""
    return x.transpose(0, 1)[:, None].expand(-1, queries.shape[1] // x.shape[1], -1, -1)


def _tokens_first(x: Tensor) -> Tensor:
    """Back to `[tokens, heads, d]`."""
    return x.flatten(0, 1).transpose(0, 1)
