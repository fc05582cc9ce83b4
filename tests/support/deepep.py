"""DeepEP's `Buffer` over gloo: what its kernels between the GPUs of a node do, without a GPU.

Of `deep_ep.Buffer` (github.com/deepseek-ai/DeepEP, v1.2.1) what megatron-core calls: a token travels once to every
rank that has one of its experts, and results are summed on its way back. Gradients are the other one of the two.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Handle:
    """Which of this rank's tokens went to each rank, and how many came from each."""

    sent: list[Tensor]
    received: list[int]
    tokens: int


class Buffer:
    """Between the ranks of `group`, each with as many experts."""

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(_: int) -> None: ...

    @staticmethod
    def get_dispatch_config(_: int) -> Any:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda *_: 0, get_rdma_buffer_size_hint=lambda *_: 0)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: Any) -> tuple[Any, ...]:
        """Only the two that are used here: tokens for each expert, and which tokens go to which rank."""
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        here = torch.zeros(len(topk_idx), num_experts, dtype=torch.bool).scatter_(1, topk_idx, True)
        return None, None, per_expert, here.unflatten(1, (self.group.size(), -1)).any(-1), None

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        """`x [tokens, hidden]` to the ranks. By `handle`, as it went before; nothing but `x` then."""
        if handle is not None:
            return self._exchange(x, handle), None, None, None, None, _Event()
        assert topk_idx is not None and topk_weights is not None
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_weights.dtype == torch.float32, "of its kernels"
        sent = [column.nonzero()[:, 0] for column in is_token_in_rank.T]
        counts = torch.tensor([len(rows) for rows in sent])
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        handle = Handle(sent, received.tolist(), len(x))
        local = len(num_tokens_per_expert) // self.group.size()
        experts = self._exchange(topk_idx, handle) - local * dist.get_rank(self.group)
        elsewhere = (experts < 0) | (experts >= local)
        experts = experts.masked_fill(elsewhere, -1)
        weights = self._exchange(topk_weights, handle).masked_fill(elsewhere, 0.0)
        counted = torch.bincount(experts[experts >= 0], minlength=local).tolist()
        return self._exchange(x, handle), experts, weights, counted, handle, _Event()

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Rows that `dispatch` brought, summed where their tokens came from; their weights as well."""
        weights = None if topk_weights is None else self._summed(topk_weights, handle)
        return self._summed(x, handle), weights, _Event()

    def _exchange(self, rows: Tensor, handle: Handle) -> Tensor:
        parts = [rows[indices] for indices in handle.sent]
        result = rows.new_empty(sum(handle.received), *rows.shape[1:])
        dist.all_to_all_single(
            result, torch.cat(parts), handle.received, [len(part) for part in parts], group=self.group
        )
        return result

    def _summed(self, rows: Tensor, handle: Handle) -> Tensor:
        lengths = [len(indices) for indices in handle.sent]
        back = rows.new_empty(sum(lengths), *rows.shape[1:])
        dist.all_to_all_single(back, rows.contiguous(), lengths, handle.received, group=self.group)
        total = rows.new_zeros(handle.tokens, *rows.shape[1:])
        return total.index_add_(0, torch.cat(handle.sent), back)


class _Event:
    """Of a stream; here all is done when a call returns."""

    def __init__(self, *_: Any) -> None: ...

    def current_stream_wait(self) -> None: ...


def install() -> None:
    """Before megatron-core is imported, which looks for it then."""
    assert "megatron.core.transformer.moe.fused_a2a" not in sys.modules
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    vars(package).update(Buffer=Buffer, utils=utils)
    vars(utils).update(EventHandle=_Event, EventOverlap=_Event)
    sys.modules |= {"deep_ep": package, "deep_ep.utils": utils}
