"""Two interleaved pipeline ranks exchange the shapes of variable-length tensors crosswise.

With two ranks "previous" and "next" are the same peer, whose messages are matched in order of posting.
pipeline_parallel/p2p_communication.py:217 posts sends and receives "previous first" on both sides, so the
shape meant for the next stage arrives as that of the previous one. The tensors themselves travel in the
order of `_p2p_ops`, which alternates by rank and is right: here the shapes do too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from megatron_patches.patch import Patch


def _module() -> Any:
    from megatron.core.pipeline_parallel import p2p_communication

    return p2p_communication


def _needed() -> bool:
    return "batch_isend_irecv" in inspect.getsource(_module().P2PCommunicator._communicate_shapes)


def _communicate_shapes(
    self: Any,
    tensor_send_next: Tensor | None,
    tensor_send_prev: Tensor | None,
    recv_prev: bool,
    recv_next: bool,
) -> tuple[list[int], list[int]]:
    def sent(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.tensor(tensor.shape, device=device, dtype=torch.int64)

    def received(wanted: bool) -> Tensor | None:
        return torch.zeros(3, device=device, dtype=torch.int64) if wanted else None

    device = torch.cuda.current_device()
    from_prev, from_next = received(recv_prev), received(recv_next)
    requests = _module()._p2p_ops(
        tensor_send_prev=sent(tensor_send_prev),
        tensor_recv_prev=from_prev,
        tensor_send_next=sent(tensor_send_next),
        tensor_recv_next=from_next,
        group=self.pp_group,
        prev_pipeline_rank=self.prev_rank,
        next_pipeline_rank=self.next_rank,
    )
    for request in requests.values():
        request.wait()
    torch.cuda.synchronize()
    nothing = [0, 0, 0]
    return (
        nothing if from_prev is None else from_prev.tolist(),
        nothing if from_next is None else from_next.tolist(),
    )


def _apply() -> None:
    _module().P2PCommunicator._communicate_shapes = _communicate_shapes


PATCH = Patch(
    name="interleaved_shapes",
    scope="any",
    upstream="megatron/core/pipeline_parallel/p2p_communication.py:217",
    breaks="an interleaved pipeline of two ranks receives tensors in the wrong shape, or aborts",
    needed=_needed,
    apply=_apply,
)
