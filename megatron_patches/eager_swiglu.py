"""SwiGLU is one kernel where `jit_fuser` compiles it; on a CPU it is a dozen passes over memory.

Its backward pass took a tenth of a dense training step, and a seventh of one with experts. Here torch's own gradient
of SiLU is a single pass, halves of the result are written in place, and blocks of rows stay in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_patches.patch import Patch

_BLOCK = 1 << 20
"""Elements of one half of the input that are worked on at a time."""


def swiglu(y: Tensor) -> Tensor:
    """`[tokens, 2 ffn]`, gate and up, to `[tokens, ffn]`."""
    gate, up = y.chunk(2, -1)
    return F.silu(gate).mul_(up)


def swiglu_back(g: Tensor, y: Tensor) -> Tensor:
    """Gradient of `y` from that of the output."""
    grad = torch.empty_like(y, dtype=torch.result_type(g, y))
    for rows in _blocks(y):
        _gradient(g[rows], y[rows], grad[rows])
    return grad


def weighted_swiglu_back(g: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `y` and of the tokens' weights `[tokens, 1]`."""
    grad, weights_grad = torch.empty_like(y, dtype=torch.result_type(g, weights)), torch.empty_like(weights)
    for rows in _blocks(y):
        silu, up = _gradient(g[rows] * weights[rows], y[rows], grad[rows]), y[rows].chunk(2, -1)[1]
        weights_grad[rows] = torch.sum(silu.mul_(up) * g[rows].to(weights.dtype), dim=-1, keepdim=True)
    return grad.to(y.dtype), weights_grad


def _gradient(g: Tensor, y: Tensor, into: Tensor) -> Tensor:
    """Write the gradient of `y`; returns SiLU of the gate."""
    gate, up = y.chunk(2, -1)
    d_gate, d_up = into.chunk(2, -1)
    silu = F.silu(gate)
    torch.mul(g, silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(g * up, gate.to(into.dtype), grad_input=d_gate)
    return silu


def _blocks(y: Tensor) -> Iterator[slice]:
    size = max(1, 2 * _BLOCK // max(1, y.shape[-1]))
    for start in range(0, y.shape[0], size):
        yield slice(start, start + size)


def _upstream() -> Any:
    from megatron.core.fusions import fused_bias_swiglu

    return fused_bias_swiglu


def _needed() -> bool:
    return "torch.cat(" in inspect.getsource(inspect.unwrap(_upstream().swiglu_back))


def _apply() -> None:
    upstream = _upstream()
    upstream.swiglu, upstream.swiglu_back = swiglu, swiglu_back
    upstream.weighted_swiglu_back = weighted_swiglu_back


PATCH = Patch(
    name="eager_swiglu",
    scope="cpu",
    upstream="megatron/core/fusions/fused_bias_swiglu.py:16,60,81",
    breaks="nothing; a training step without CUDA takes up to a seventh longer",
    needed=_needed,
    apply=_apply,
)
