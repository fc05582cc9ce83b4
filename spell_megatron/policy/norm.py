"""Root-mean-square norm that keeps its input and one number a token for the backward pass, and nothing else.

On CUDA torch has a kernel that does so. Elsewhere torch puts the norm together from single operations, each of which
keeps what it was given; here the normalised input is made again. Backward, a layer norm of mean 0 is the same but for
the mean of the weighted gradient, which it takes away, and torch has a kernel for that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., n]` over the root of its mean square, times `weight [n]`; computed in float32."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = (wide * inverse).mul_(weight).to(x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad, scale = x.float().contiguous(), grad.float().contiguous(), weight.float()
        mean = torch.zeros_like(inverse)
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, wide, weight.shape, mean, inverse, scale, None, (True, True, False)
        )
        taken = (grad.flatten(0, -2) @ scale).view_as(inverse).mul_(inverse).div_(x.shape[-1])
        return d_x.add_(taken).to(x.dtype), d_weight.to(weight.dtype), None
