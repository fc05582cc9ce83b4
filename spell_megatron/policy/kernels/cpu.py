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
"""Tokens of a causal range whose backward call may be made in halves, down to ranges of so many."""
_WIDE = 128
"""Dimensions of a head whose products take so long that halves are worth it with any instructions."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for q0, q1, k0, k1 in pieces.ranges:
        rows, keys = slice(q0, q1), slice(k0, k1)
        out, lse = _forward(
            _heads_first(q[rows]),
            _heads_first(k[keys]),
            _heads_first(v[keys]),
            0.0,
            pieces.causal,
            scale=scale,
        )
        yield rows, _tokens_first(out), lse[0]


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Pieces, scale: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    for (q0, q1, k0, k1), causal in _blocks(pieces, q.shape[-1]):
        rows, keys = slice(q0, q1), slice(k0, k1)
        dq, dk, dv = _backward(
            _heads_first(grad[rows]),
            _heads_first(q[rows]),
            _heads_first(k[keys]),
            _heads_first(v[keys]),
            _heads_first(out[rows]),
            lse[None, :, rows],
            0.0,
            causal,
            scale=scale,
        )
        yield rows, keys, _tokens_first(dq), _tokens_first(dk), _tokens_first(dv)


def _blocks(pieces: Pieces, dimensions: int) -> Iterator[tuple[Range, bool]]:
    """Ranges as the backward kernel wants them, and whether each is causal: gradients are sums, whatever the cut."""
    halved = pieces.causal and (dimensions >= _WIDE or _products_are_slow())
    for q0, q1, k0, k1 in pieces.ranges:
        if halved and q1 - q0 in _HALVED:
            yield from _halves(q0, q1, k0)
        else:
            yield (q0, q1, k0, k1), pieces.causal


def _products_are_slow() -> bool:
    return mkl_is_slow() or torch.backends.cpu.get_cpu_capability() != "AVX512"


def _halves(q0: int, q1: int, k0: int) -> Iterator[tuple[Range, bool]]:
    """A causal range as two, and all that the later one sees of the earlier.

    The kernel's own blocks are so long that a fifth of its work lies above the diagonal. Where products are fast and
    narrow, that takes less than the further calls do (`python -m benchmarks.trainer`).
    """
    tokens = q1 - q0
    if tokens <= _WHOLE:
        yield (q0, q1, k0, k0 + tokens), True
        return
    half = tokens // 2
    yield from _halves(q0, q0 + half, k0)
    yield (q0 + half, q1, k0, k0 + half), False
    yield from _halves(q0 + half, q1, k0 + half)


def _heads_first(x: Tensor) -> Tensor:
    """`[tokens, heads, d]` to `[1, heads, tokens, d]`, without a copy. Of keys there may be fewer heads."""
    return x.transpose(0, 1)[None]


def _tokens_first(x: Tensor) -> Tensor:
    """Back to `[tokens, heads, d]`."""
    return x[0].transpose(0, 1)
