"""Span attention: packing, shared prompts and context parallelism by one mechanism.

A stream is a list of spans; a query span attends to itself, causally, and to whole earlier ranges (its
group's prompt; its own earlier chunks under context parallelism). That needs no mask and never a score
matrix: pairs of ranges go to a flash-attention kernel, and what a query got of each is merged by its
log-sum-exp. The backward pass calls the flash backward of every piece with the MERGED output and
log-sum-exp, which is exact, as in ring attention (arXiv 2310.01889).

Where layers are recomputed, attention need not be: what a layer's queries got is kept with the stream's plan from the
forward pass to the backward pass, which begins with it.

Under context parallelism keys and values are all-gathered in the forward pass, gathered again in the
backward pass (so that a rank keeps only its own between the two), and their gradients reduce-scattered.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from spell_megatron.policy.kernels import kernels_for
from spell_megatron.policy.spans import Rows, SpanPlan


class SpanAttention(MegatronModule):
    """Core attention of a Megatron layer over the spans of a `SpanPlan`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        keep_output: bool = False,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.keep_output = layer_number, keep_output
        self.cp_group = pg_collection.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SpanPlan | None = None,
    ) -> Tensor:
        """Queries `[tokens / cp, 1, heads / tp, d]`, keys and values of the kv heads to
        `[tokens / cp, 1, heads / tp * d]`."""
        plan = packed_seq_params
        assert plan is not None
        q, kv = query.squeeze(1), torch.stack((key.squeeze(1), value.squeeze(1)), 1)
        return self._attend(q, kv, plan).flatten(1).unsqueeze(1)

    def _attend(self, q: Tensor, kv: Tensor, plan: SpanPlan) -> Tensor:
        if not (self.keep_output and self.training):
            return attend(q, kv, plan, self.cp_group, self.scale)
        if torch.is_grad_enabled():  # recomputed, where it is known
            return attend(q, kv, plan, self.cp_group, self.scale, plan.attended.pop(self.layer_number, None))
        plan.attended[self.layer_number] = found = attended(q, kv, plan, self.cp_group, self.scale)
        return found[0]


def attend(
    q: Tensor,
    kv: Tensor,
    plan: SpanPlan,
    cp_group: Any,
    scale: float,
    known: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Local queries `[tokens / cp, heads, d]` over the spans of a plan, given this rank's keys and values
    `[tokens / cp, 2, kv heads, d]`. A collective of `cp_group`, which without context parallelism may be None.

    `known` is what `attended` has found before for the same: then only the backward pass is computed.
    """
    out: Tensor = _MergedPieces.apply(q, kv, plan, cp_group, scale, known)  # type: ignore[no-untyped-call]
    return out


def attended(q: Tensor, kv: Tensor, plan: SpanPlan, cp_group: Any, scale: float) -> tuple[Tensor, Tensor]:
    """What queries got, `[tokens / cp, heads, d]`, and its log-sum-exp, float32 `[heads, tokens / cp]`."""
    keys, values = _stream_kv(kv, plan, cp_group)
    out = torch.empty_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    lse, kernels = out.new_empty(q.shape[1], q.shape[0]), kernels_for(q)
    for pieces in plan.pieces:
        for rows, part, part_lse in kernels.forward(q, keys, values, pieces, scale):
            if pieces.causal:  # every query has one such piece, and it comes first
                out[rows], lse[:, rows] = part.to(out.dtype), part_lse
            else:
                _merge(out, lse, rows, part, part_lse)
    return out.to(q.dtype), lse


class _MergedPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        plan: SpanPlan,
        cp_group: Any,
        scale: float,
        known: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        out, lse = known or attended(q, kv, plan, cp_group, scale)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.plan, ctx.cp_group, ctx.scale = plan, cp_group, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        keys, values = _stream_kv(kv, ctx.plan, ctx.cp_group)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q, dtype=wide)
        dkv = torch.zeros(keys.shape[0], *kv.shape[1:], dtype=wide, device=kv.device)
        (d_keys, d_values), kernels = dkv.unbind(1), kernels_for(q)
        for pieces in ctx.plan.pieces:
            parts = kernels.backward(grad, q, keys, values, out, lse, pieces, ctx.scale)
            for rows, key_rows, part_q, part_k, part_v in parts:
                dq[rows] += part_q
                d_keys[key_rows] += part_k
                d_values[key_rows] += part_v
        del keys, values  # before the gradients are exchanged
        return dq.to(q.dtype), _local_kv_grad(dkv, ctx.plan, ctx.cp_group).to(kv.dtype), *(None,) * 4


def _merge(out: Tensor, lse: Tensor, rows: Rows, part: Tensor, part_lse: Tensor) -> None:
    """Add another piece's output to that of some rows, by their log-sum-exps, in place."""
    into, into_lse = out[rows], lse[:, rows]
    total = torch.logaddexp(into_lse, part_lse)
    into.mul_(_weight(into_lse, total)).addcmul_(part.to(out.dtype), _weight(part_lse, total))
    if not isinstance(rows, slice):  # then it is a copy
        out[rows] = into
    lse[:, rows] = total


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    """The share of a piece in the whole softmax, `[rows, heads, 1]`."""
    return (lse - total).exp_().transpose(0, 1).unsqueeze(-1)


def _stream_kv(kv: Tensor, plan: SpanPlan, cp_group: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole stream, in stream order, `[tokens, kv heads, d]` each."""
    if plan.to_stream is not None:
        gathered = kv.new_empty(kv.shape[0] * cp_group.size(), *kv.shape[1:])
        dist.all_gather_into_tensor(gathered, kv.contiguous(), group=cp_group)
        kv = gathered.index_select(0, plan.to_stream)
    return kv[:, 0], kv[:, 1]


def _local_kv_grad(dkv: Tensor, plan: SpanPlan, cp_group: Any) -> Tensor:
    """This rank's share of the stream's gradient, summed over the context-parallel ranks."""
    if plan.from_stream is None:
        return dkv
    by_rank = dkv.index_select(0, plan.from_stream)
    local = by_rank.new_empty(by_rank.shape[0] // cp_group.size(), *by_rank.shape[1:])
    dist.reduce_scatter_tensor(local, by_rank, group=cp_group)
    return local
