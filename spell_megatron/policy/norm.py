"""Root-mean-square norm that keeps its input and one number a token for the backward pass, and nothing else.

On CUDA torch has a kernel that does so. Elsewhere torch puts the norm together from single operations, each of which
keeps what it was given; here the normalised input is made again.
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
        inverse: Tensor = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, grad.float()
        d_weight = (grad * normed).flatten(0, -2).sum(0)
        d_normed = grad * weight
        along = torch.linalg.vecdot(d_normed, normed).unsqueeze(-1) / x.shape[-1]
        return d_normed.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), d_weight.to(weight.dtype), None
