"""The table of tokens and experts, made of the numbers that DeepEP brings; upstream waits for the device three times.

It counts the entries that name no expert, and the host waits for that count (token_dispatcher.py:1219). Its kernel
that does not wait wants experimental functions switched on. Here these entries go into a column of their own, which is
cut off.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from megatron_patches.patch import Patch


def indices_to_multihot(manager: Any, indices: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """`[tokens, topk]` local experts, -1 for none, and their weights, to `[tokens, local experts]` each."""
    experts = manager.num_local_experts
    columns = indices.masked_fill(indices < 0, experts)
    size = indices.shape[0], experts + 1
    routed = torch.zeros(size, dtype=torch.bool, device=indices.device).scatter_(1, columns, True)
    weights = torch.zeros(size, dtype=torch.float32, device=indices.device).scatter(1, columns, probs.float())
    return routed[:, :experts], weights[:, :experts]


def _upstream() -> Any:
    from megatron.core.transformer.moe import token_dispatcher

    return token_dispatcher._DeepepManager


def _needed() -> bool:
    return "repeat_interleave" in inspect.getsource(_upstream()._indices_to_multihot)


def _apply() -> None:
    _upstream()._indices_to_multihot = indices_to_multihot


PATCH = Patch(
    name="deepep_multihot",
    scope="any",
    upstream="megatron/core/transformer/moe/token_dispatcher.py:1219",
    breaks="nothing; the host waits three times more for every layer of experts that DeepEP serves",
    needed=_needed,
    apply=_apply,
)
