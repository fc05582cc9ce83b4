"""The norm of the gradients waits for the device once for every tensor, where Transformer Engine is missing.

Without it upstream makes a list of Python numbers of the norms (utils.py:1205). The same arithmetic on the device
gives what Transformer Engine's kernel gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_patches.patch import Patch


def _clip_grads() -> Any:
    from megatron.core.optimizer import clip_grads

    return clip_grads


def _needed() -> bool:
    return "float(" in inspect.getsource(inspect.unwrap(_clip_grads().l2_norm_impl))


def _l2_norm(
    _chunk: int, _overflow: Tensor, tensors: Sequence[Sequence[Tensor]], *_: Any
) -> tuple[Tensor, None]:
    """Float32 `[1]`, of all tensors together."""
    norms = torch._foreach_norm([tensor for each in tensors for tensor in each])
    return torch.linalg.vector_norm(torch.stack(norms).float()).reshape(1), None


def _apply() -> None:
    _clip_grads().l2_norm_impl = _l2_norm


PATCH = Patch(
    name="local_norm",
    scope="any",
    upstream="megatron/core/utils.py:1205; optimizer/clip_grads.py:42",
    breaks="nothing; every step waits for the device as often as there are parameters",
    needed=_needed,
    apply=_apply,
    layers="torch",
)
