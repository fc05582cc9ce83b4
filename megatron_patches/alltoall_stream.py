"""The all-to-all dispatcher of experts copies its split sizes to the host on a CUDA stream.

On a CPU the sizes are on the host already: they only become numpy arrays, which the collectives want.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from megatron_patches.patch import Patch


def _dispatcher() -> Any:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    return MoEAlltoAllTokenDispatcher


def _needed() -> bool:
    return "torch.cuda.Stream()" in inspect.getsource(_dispatcher().__init__)


def _to_host(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
    if not self.drop_and_pad and point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            value = getattr(self, name)
            if torch.is_tensor(value):
                setattr(self, name, value.numpy())
    return tokens_per_expert


def _apply() -> None:
    dispatcher = _dispatcher()
    dispatcher.cuda_dtoh_stream = torch.device("cpu")  # any value but None: no stream is made
    dispatcher._maybe_dtoh_and_synchronize = _to_host


PATCH = Patch(
    name="alltoall_stream",
    scope="cpu",
    upstream="megatron/core/transformer/moe/token_dispatcher.py:445,860",
    breaks="a mixture of experts cannot be built without CUDA",
    needed=_needed,
    apply=_apply,
)
