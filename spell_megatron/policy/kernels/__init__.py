"""Attention over ranges, for each device. The only attention code that differs by device.

A backend is a module of two generators. Each yields what one of its calls computed and for which rows, so
that one device may call its kernel range by range and another once for all ranges. Queries are `[tokens, heads, d]`,
keys and values `[tokens, kv heads, d]` with `heads` a multiple; the log-sum-exp is float32 `[heads, tokens]`.

    cpu     torch's CPU flash kernel, a call for every range; nothing is copied
    varlen  the CUDA flash kernel in half precision, one call of variable lengths for all ranges
    plain   matrix products in blocks of queries: CUDA in float32, where no flash kernel goes
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from spell_megatron.policy.kernels import cpu, plain, varlen
from spell_megatron.policy.spans import Pieces, Rows


class Kernels(Protocol):
    """What a backend offers."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float
    ) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        """Rows of the queries, their output `[rows, heads, d]` and log-sum-exp `[heads, rows]`."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        pieces: Pieces,
        scale: float,
    ) -> Iterator[tuple[Rows, Rows, Tensor, Tensor, Tensor]]:
        """Rows of the queries and of the keys, and what this call adds to the gradients of q, k and v there.

        `out` and `lse` are those of every piece that a query has, merged: the softmax of one piece is recomputed
        from `lse`, which makes the sum over pieces exact.
        """
        ...


def kernels_for(query: Tensor) -> Kernels:
    """The backend for the queries' device and precision."""
    if not query.is_cuda:
        return cpu
    return varlen if query.dtype in (torch.bfloat16, torch.float16) else plain
