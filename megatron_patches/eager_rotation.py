"""Rotary positions are one kernel where Transformer Engine has it; on a CPU they are a dozen passes over memory.

Four of them copy what is not rotated, which here is nothing. In place, half by half, they take a third of the time,
forward and backward: a thirtieth of a dense training step. In half precision roundings stay those of upstream, which
Hugging Face has as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_patches.patch import Patch

_tables = WeakTensorKeyDictionary()
"""Cosines and sines of angles, for as long as anybody has these."""


class _Rotation(torch.autograd.Function):
    """Halves of the last dimension are rotated against each other, as rotate_half has it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(t, cos, sin.chunk(2, -1), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin.chunk(2, -1)[::-1], -1), None, None


def rotated(t: Tensor, freqs: Tensor, mscale: float = 1.0) -> Tensor:
    """`t [tokens, batch, heads, d]` by the angles `freqs [tokens, 1, 1, d]`, both float32."""
    if freqs not in _tables:  # the same in all layers
        _tables[freqs] = freqs.cos(), freqs.sin()
    cos, sin = _tables[freqs] if mscale == 1 else (table * mscale for table in _tables[freqs])
    return _Rotation.apply(t, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


def _turned(t: Tensor, cos: Tensor, sines: Sequence[Tensor], sign: int) -> Tensor:
    """One way or back; `sines` are those that the halves of the result take."""
    out, (first, second) = t * cos, t.chunk(2, -1)
    out_1, out_2 = out.chunk(2, -1)
    out_1.addcmul_(second, sines[0], value=-sign)
    out_2.addcmul_(first, sines[1], value=sign)
    return out


def _upstream() -> Any:
    from megatron.core.models.common.embeddings import rope_utils

    return rope_utils


def _needed() -> bool:
    return "cat((t, t_pass)" in inspect.getsource(_upstream()._apply_rotary_pos_emb_bshd)


def _apply() -> None:
    upstream = _upstream()
    original = upstream._apply_rotary_pos_emb_bshd

    @functools.wraps(original)
    def apply(t: Tensor, freqs: Tensor, *kinds: Any, mscale: float = 1.0, **kind: Any) -> Tensor:
        plain = not kinds and not any(kind.values()) and freqs.shape[-1] == t.shape[-1]
        if not plain or t.dtype != torch.float32:
            return original(t, freqs, *kinds, mscale=mscale, **kind)  # type: ignore[no-any-return]
        return rotated(t, freqs, mscale)

    upstream._apply_rotary_pos_emb_bshd = apply


PATCH = Patch(
    name="eager_rotation",
    scope="cpu",
    upstream="megatron/core/models/common/embeddings/rope_utils.py:92",
    breaks="nothing; a training step without CUDA takes a thirtieth longer",
    needed=_needed,
    apply=_apply,
)
