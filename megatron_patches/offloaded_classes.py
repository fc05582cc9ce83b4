"""A checkpoint of an offloaded optimizer holds Python classes among its plain values, and cannot be read again.

HybridDeviceOptimizer passes the classes of its inner optimizers as defaults of a parameter group
(optimizer/cpu_offloading/hybrid_optimizer.py:57), so they stand in every group that is saved; megatron-core reads
what is no tensor without a full unpickler (dist_checkpointing/strategies/common.py:77). They are left out: an
optimizer is always made with its own.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron_patches.patch import Patch


def _optimizer() -> Any:
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    return HybridDeviceOptimizer


def _needed() -> bool:
    return '"cpu_optimizer_cls": cpu_optimizer_cls' in inspect.getsource(
        inspect.unwrap(_optimizer().__init__)
    )


def _apply() -> None:
    original = _optimizer().state_dict

    def state_dict(self: Any) -> dict[str, Any]:
        state = original(self)
        groups = [
            {key: value for key, value in group.items() if not isinstance(value, type)}
            for group in state["param_groups"]
        ]
        return {**state, "param_groups": groups}

    _optimizer().state_dict = state_dict


PATCH = Patch(
    name="offloaded_classes",
    scope="any",
    upstream="megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py:57",
    breaks="UnpicklingError when a run with an offloaded optimizer is resumed",
    needed=_needed,
    apply=_apply,
)
