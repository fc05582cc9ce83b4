"""Span attention: packing, shared prompts and context parallelism by one mechanism.

A stream is a list of spans; a query span attends to itself, causally, and to whole earlier ranges (its
group's prompt; its own earlier chunks under context parallelism). That needs no mask and never a score
matrix: every pair of ranges is one flash-attention call, and the calls of a query are merged by their
log-sum-exp. The backward pass calls the flash backward of every piece with the MERGED output and
log-sum-exp, which is exact, as in ring attention (arXiv 2310.01889).

Under context parallelism keys and values are all-gathered in the forward pass, gathered again in the
backward pass (so that a rank keeps only its own between the two), and their gradients reduce-scattered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from spell_megatron.policy import kernels
from spell_megatron.policy.spans import Piece, SpanPlan

_KEY_BLOCK = 16_384
"""Keys of one backward call: with grouped queries its kernel makes a gradient of the keys for every query head
before it sums them, which over a whole stream would outweigh all else that a context-parallel rank holds."""


class SpanAttention(MegatronModule):
    """Core attention of a Megatron layer over the spans of a `SpanPlan`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
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
        assert packed_seq_params is not None
        q, kv = query.squeeze(1), torch.stack((key.squeeze(1), value.squeeze(1)), 1)
        out = _MergedPieces.apply(q, kv, packed_seq_params, self.cp_group, self.scale)
        return out.flatten(1).unsqueeze(1)


class _MergedPieces(torch.autograd.Function):
    """Attention of local queries `[t, heads, d]` over the stream's `[t, 2, kv heads, d]` keys and values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, plan: SpanPlan, cp_group: Any, scale: float) -> Tensor:
        keys, values = _stream_kv(kv, plan, cp_group)
        queries = q.transpose(0, 1)
        out = torch.empty_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        merged = out.transpose(0, 1)
        lse = out.new_empty(merged.shape[:2])
        for q0, q1, k0, k1, causal in plan.pieces:
            part, part_lse = kernels.forward(
                queries[:, q0:q1], keys[:, k0:k1], values[:, k0:k1], causal, scale
            )
            into, into_lse = merged[:, q0:q1], lse[:, q0:q1]
            if causal:  # a span's own causal piece comes first and initialises it
                into.copy_(part)
                into_lse.copy_(part_lse)
                continue
            total = torch.logaddexp(into_lse, part_lse)
            into.mul_((into_lse - total).exp_().unsqueeze(-1))
            into.addcmul_(part.to(into.dtype), (part_lse - total).exp_().unsqueeze(-1))
            into_lse.copy_(total)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.plan, ctx.cp_group, ctx.scale = plan, cp_group, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, kv, out, lse = ctx.saved_tensors
        keys, values = _stream_kv(kv, ctx.plan, ctx.cp_group)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q, dtype=wide)
        dkv = torch.zeros(keys.shape[1], *kv.shape[1:], dtype=wide, device=kv.device)
        d_queries, d_keys, d_values = dq.transpose(0, 1), *(dkv[:, i].transpose(0, 1) for i in range(2))
        queries, outs, grads = q.transpose(0, 1), out.transpose(0, 1), grad.transpose(0, 1)
        for q0, q1, k0, k1, causal in _blocks(ctx.plan.pieces, cuda=q.is_cuda):
            part_q, part_k, part_v = kernels.backward(
                grads[:, q0:q1],
                queries[:, q0:q1],
                keys[:, k0:k1],
                values[:, k0:k1],
                outs[:, q0:q1],
                lse[:, q0:q1],
                causal,
                ctx.scale,
            )
            d_queries[:, q0:q1] += part_q
            d_keys[:, k0:k1] += part_k
            d_values[:, k0:k1] += part_v
        del keys, values  # before the gradients are exchanged
        return dq.to(q.dtype), _local_kv_grad(dkv, ctx.plan, ctx.cp_group).to(kv.dtype), None, None, None


def _blocks(pieces: Sequence[Piece], *, cuda: bool) -> Iterator[Piece]:
    """Pieces as the backward kernel wants them: gradients are sums, whatever the cut."""
    for q0, q1, first, end, causal in pieces:
        if causal:
            for a, b, c, d, square in kernels.causal_blocks(q1 - q0, cuda=cuda):
                yield q0 + a, q0 + b, first + c, first + d, square
        else:
            for k0 in range(first, end, _KEY_BLOCK):
                yield q0, q1, k0, min(k0 + _KEY_BLOCK, end), False


def _stream_kv(kv: Tensor, plan: SpanPlan, cp_group: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole stream, in stream order, `[kv heads, tokens, d]` each."""
    if plan.to_stream is not None:
        gathered = kv.new_empty(kv.shape[0] * cp_group.size(), *kv.shape[1:])
        dist.all_gather_into_tensor(gathered, kv.contiguous(), group=cp_group)
        kv = gathered.index_select(0, plan.to_stream)
    return kv[:, 0].transpose(0, 1), kv[:, 1].transpose(0, 1)


def _local_kv_grad(dkv: Tensor, plan: SpanPlan, cp_group: Any) -> Tensor:
    """This rank's share of the stream's gradient, summed over the context-parallel ranks."""
    if plan.from_stream is None:
        return dkv
    by_rank = dkv.index_select(0, plan.from_stream)
    local = by_rank.new_empty(by_rank.shape[0] // cp_group.size(), *by_rank.shape[1:])
    dist.reduce_scatter_tensor(local, by_rank, group=cp_group)
    return local
