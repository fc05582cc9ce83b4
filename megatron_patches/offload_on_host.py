"""An offloaded optimizer copies the parameters of a GPU, and on a CPU finds none.

HybridDeviceOptimizer gives every parameter on a GPU a float32 copy in host memory, which torch's AdamW works on
(optimizer/cpu_offloading/hybrid_optimizer.py:251); a parameter that is there already gets none, and the first step
looks for it in vain. On a CPU every parameter is taken as one to be offloaded, and memory is not pinned: what a recipe
does with its optimizer can be run, saved and resumed before there is a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_patches.patch import Patch


def _optimizer() -> Any:
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    return HybridDeviceOptimizer


def _needed() -> bool:
    return not torch.cuda.is_available()


def _sub_optimizer_param_groups(self: Any, _offload_fraction: float) -> tuple[Any, ...]:
    """Upstream's contract: groups for the CPU and for the GPU, copies by parameter, parameters by copy, and the copies
    of parameters that are not float32."""
    copies: dict[Any, Any] = {}
    groups = []
    for group in self.param_groups:
        copies |= {parameter: parameter.detach().clone().float() for parameter in group["params"]}
        groups.append({**group, "params": [copies[parameter] for parameter in group["params"]]})
    originals = {copy: parameter for parameter, copy in copies.items()}
    narrow = {parameter: copy for parameter, copy in copies.items() if parameter.dtype != torch.float32}
    return groups, [], copies, originals, narrow


def _apply() -> None:
    optimizer = _optimizer()
    original = optimizer.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "pin_cpu_grads": False, "pin_cpu_params": False})

    optimizer.__init__ = init
    optimizer._get_sub_optimizer_param_groups = _sub_optimizer_param_groups


PATCH = Patch(
    name="offload_on_host",
    scope="cpu",
    upstream="megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py:251",
    breaks="KeyError at the first step of an offloaded optimizer",
    needed=_needed,
    apply=_apply,
)
