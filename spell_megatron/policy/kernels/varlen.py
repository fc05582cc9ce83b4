"""The flash kernel of CUDA in its variable-length form: all ranges of a piece in one call.

It wants queries and keys packed, range after range, with cumulative lengths. What lies so already is passed as it
is; what does not (several prompts with their responses between them) is gathered. `torch.nn.attention.varlen` calls
the same kernel, but ignores the gradient that comes through the log-sum-exp, and so cannot be merged.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spell_megatron.policy.spans import Pieces, Rows

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def forward(
    q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float
) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    rows, keys = pieces.packed.queries, pieces.packed.keys
    out, lse, *_ = _forward(
        q[rows], k[keys], v[keys], *pieces.packed.lengths, 0.0, pieces.causal, False, scale=scale
    )
    yield rows, out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Pieces, scale: float
) -> Iterator[tuple[Rows, Rows, Tensor, Tensor, Tensor]]:
    rows, keys = pieces.packed.queries, pieces.packed.keys
    off = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the random state of a dropout that is off
    gradients = _backward(
        grad[rows],
        q[rows],
        k[keys],
        v[keys],
        out[rows],
        lse[:, rows].contiguous(),
        *pieces.packed.lengths,
        0.0,
        pieces.causal,
        off,
        off,
        scale=scale,
    )
    yield rows, keys, *gradients
