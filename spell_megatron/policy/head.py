"""Log-probabilities and entropies of response tokens, from hidden states, without keeping logits.

The head runs only on rows that predict a response token, in chunks; the backward pass recomputes a chunk's
logits, but for the last chunk's, which it begins with. So its peak memory is one chunk, whatever the prompt's
length or the number of responses. The vocabulary is split over the TP ranks; sums are float32.

The distribution is the one that the engine samples from: logits divided by the temperature, then cut to the
nucleus of mass `top_p`. Training on any other would make the first ratio differ from one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patches.cpu_products import product
from spell_megatron.policy.nucleus import nucleus_floor

_CACHED = 1 << 18
"""Logits that a CPU goes through several times while they are in its cache."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The distribution that tokens were sampled from."""

    temperature: float = 1.0
    top_p: float = 1.0


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, sampled: Sampled, chunk: int, tp_group: Any
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy, float32 `[n]` each, of `targets [n]` after `hidden [n, h]`.

    `weight [vocab / tp, h]` is this rank's part of the head.
    """
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, sampled, chunk, tp_group
    )
    return found


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, sampled: Sampled, chunk: int, tp_group: Any
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.shape[0]
        lse, entropy, logprobs, floor = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(4))
        ctx.last = None
        ctx.set_materialize_grads(False)  # a loss without entropy gives it no gradient
        for part in _chunks(rows, chunk):
            logits, own, column = _logits(hidden[part], weight, targets[part], sampled, tp_group)
            peak = _reduce(logits.amax(-1), dist.ReduceOp.MAX, tp_group)
            target = logits.gather(-1, column).squeeze(-1).masked_fill(~own, 0.0)
            if sampled.top_p < 1.0:
                floor[part] = nucleus_floor(logits, peak, sampled.top_p, tp_group)
                logits = _cut(logits, floor[part], own, column)
            sums = logits.new_empty(3, len(target))
            sums[0] = target
            for block in _blocks(logits):
                weights = (logits[block] - peak[block, None]).exp_()
                sums[1, block] = weights.sum(-1)
                sums[2, block] = weights.mul_(_finite(logits[block], sampled)).sum(-1)
            target, mass, total = _reduce(sums, dist.ReduceOp.SUM, tp_group)
            lse[part] = peak + mass.log()
            entropy[part] = lse[part] - total / mass
            logprobs[part] = target - lse[part]
        if rows:
            ctx.last = (logits, own, column)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, floor)
        ctx.sampled, ctx.chunk, ctx.tp_group = sampled, chunk, tp_group
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse, entropy, floor = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        # The logits were divided by the temperature.
        d_logprobs, d_entropic = (
            torch.zeros_like(lse) if d is None else d / ctx.sampled.temperature
            for d in (d_logprobs, d_entropy)
        )
        last, ctx.last = ctx.last, None
        for part in reversed(_chunks(hidden.shape[0], ctx.chunk)):
            if last is not None:
                (logits, own, column), last = last, None
            else:
                logits, own, column = _logits(hidden[part], weight, targets[part], ctx.sampled, ctx.tp_group)
                if ctx.sampled.top_p < 1.0:
                    logits = _cut(logits, floor[part], own, column)
            per_row = torch.stack((lse[part], d_logprobs[part], d_entropic[part], entropy[part]))[..., None]
            for block in _blocks(logits):
                block_lse, d_logprob, d_block, block_entropy = per_row[:, block]
                log_p, per_p = logits[block].sub_(block_lse), -d_logprob
                if d_entropy is not None:  # dH / dlogit = -p (log p + H)
                    per_p = per_p - (_finite(log_p, ctx.sampled) + block_entropy) * d_block
                log_p.exp_().mul_(per_p)
            logits.scatter_add_(-1, column, (d_logprobs[part] * own)[:, None])
            grad = logits.to(weight.dtype)
            d_hidden[part] = product(grad, weight)
            d_weight += product(grad.t(), hidden[part])
        if dist.get_world_size(ctx.tp_group) > 1:
            dist.all_reduce(d_hidden, group=ctx.tp_group)
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _blocks(logits: Tensor) -> list[slice]:
    """Rows that are worked on together: all of them where memory is fast and calls are dear."""
    rows, vocab = logits.shape
    return _chunks(rows, rows if logits.is_cuda else max(1, _CACHED // vocab))


def _logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, sampled: Sampled, tp_group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's logits `[n, vocab / tp]`, whether it holds the target's, and in which column `[n, 1]`."""
    logits = product(hidden, weight.t()).float().div_(sampled.temperature)
    column = targets - dist.get_rank(tp_group) * weight.shape[0]
    own = (column >= 0) & (column < weight.shape[0])
    return logits, own, column.clamp(0, weight.shape[0] - 1)[:, None]


def _cut(logits: Tensor, floor: Tensor, own: Tensor, column: Tensor) -> Tensor:
    """Logits outside the nucleus become -inf; the sampled token stays, whatever rounding says of it."""
    outside = logits <= floor[:, None]
    outside.scatter_(-1, column, outside.gather(-1, column) & ~own[:, None])
    return logits.masked_fill_(outside, -torch.inf)


def _finite(logits: Tensor, sampled: Sampled) -> Tensor:
    """Zero for what was cut: its weight is zero too, and their product must be."""
    return logits.masked_fill(logits.isneginf(), 0.0) if sampled.top_p < 1.0 else logits


def _reduce(value: Tensor, op: Any, tp_group: Any) -> Tensor:
    if dist.get_world_size(tp_group) > 1:
        dist.all_reduce(value, op=op, group=tp_group)
    return value
