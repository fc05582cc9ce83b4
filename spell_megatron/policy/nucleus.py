"""Where the nucleus of a distribution ends: the tokens that are outside have a mass of `top_p` above them.

The floor is found by sections of the range of logits, by the mass above each: that works on a split vocabulary, needs
no sort, and stops where float32 does. On CUDA one pass over the logits weighs 16 sections (Triton, which comes with
torch there), so that seven passes do. On a CPU a pass weighs one, of the few columns that can matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_NEGLIGIBLE = 60.0  # a logit that far below the best has no mass in float32
_PARTS = 2.0**28  # of that range, between which float32 tells no difference
_THRESHOLDS = 16
_COLUMNS = 4096  # of a row that a program of the kernel reads at a time

Masses = Callable[[Tensor], Tensor]
"""Thresholds `[n, k]` to the mass above each, in units of the best token's, of this rank's part of the vocabulary."""


def nucleus_floor(logits: Tensor, peak: Tensor, top_p: float, tp_group: Any) -> Tensor:
    """Logit `[n]` at or below which tokens lie outside the nucleus.

    `logits [n, vocab / tp]` are this rank's, float32; `peak [n]` is the best of all ranks'.
    """
    low, high = (peak - _NEGLIGIBLE)[:, None], peak[:, None]
    if logits.is_cuda:
        masses: Masses = partial(torch.ops.spell_megatron.mass_above, logits, peak)
        wanted = _sum(masses(low), tp_group) * top_p
        thresholds = _THRESHOLDS
    else:
        probabilities = (logits - peak[:, None]).exp_()
        whole = _sum(probabilities.sum(-1, keepdim=True), tp_group)
        wanted, thresholds = whole * top_p, 1
        vocabulary = logits.shape[1] * dist.get_world_size(tp_group)
        # Less likely tokens do not come to 1 - top_p all together: they are outside.
        masses = partial(_mass_above, *_likely(logits, probabilities, whole * (1 - top_p) / vocabulary))
    steps = torch.arange(thresholds + 2, device=logits.device) / (thresholds + 1)
    for _ in range(math.ceil(math.log(_PARTS, thresholds + 1))):
        edges = torch.lerp(low, high, steps)
        above = _sum(masses(edges[:, 1:-1].contiguous()), tp_group)
        last = (above >= wanted).sum(-1, keepdim=True)  # the higher a threshold, the less is above it
        low, high = edges.gather(1, last), edges.gather(1, last + 1)
    return low.squeeze(1)


def _likely(logits: Tensor, probabilities: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """As many of the best columns of each row as hold all that is as likely as `least [n, 1]` in any of them."""
    most = int((probabilities >= least).sum(-1).max()) if len(logits) else 0
    if most > logits.shape[1] // 4:
        return logits, probabilities
    best, columns = logits.topk(most, sorted=False)
    return best, probabilities.gather(1, columns)


def _mass_above(logits: Tensor, probabilities: Tensor, threshold: Tensor) -> Tensor:
    return (probabilities * (logits > threshold)).sum(-1, keepdim=True)


def _sum(value: Tensor, tp_group: Any) -> Tensor:
    if dist.get_world_size(tp_group) > 1:
        dist.all_reduce(value, group=tp_group)
    return value


@torch.library.custom_op("spell_megatron::mass_above", mutates_args=())
def mass_above(logits: Tensor, peak: Tensor, thresholds: Tensor) -> Tensor:
    """`logits [n, v]` and `peak [n]` in float32, `thresholds [n, k]` with `k` a power of two, to `[n, k]`."""
    masses = torch.empty_like(thresholds)
    rows, vocabulary = logits.shape
    if rows:
        _kernel()[(rows,)](
            logits, peak, thresholds, masses, vocabulary, K=thresholds.shape[1], BLOCK=_COLUMNS, num_warps=8
        )
    return masses


@mass_above.register_fake
def _(logits: Tensor, peak: Tensor, thresholds: Tensor) -> Tensor:
    return torch.empty_like(thresholds)


@functools.cache
def _kernel() -> Any:
    from spell_megatron.policy.kernels.mass_above import kernel

    return kernel
