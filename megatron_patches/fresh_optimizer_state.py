"""The distributed optimizer cannot be saved before its first step when torch's Adam is underneath.

`state_dict()` reads the step of every parameter (optimizer/distrib_optimizer.py:642), which torch's Adam
makes only at the first update. The state is made beforehand, as that update would. An offloaded optimizer has a
float32 copy of every parameter, which is a part of its state.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_patches.patch import Patch


def torch_adam_is_used() -> bool:
    """Neither Transformer Engine's nor apex's fused Adam is there."""
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


def _apply() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.state_dict

    @functools.wraps(original)
    def state_dict(self: Any) -> dict[str, Any]:
        copies = getattr(self.optimizer, "param_to_inner_param", {})
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if "step" in state:
                    continue
                main = copies.get(parameter, parameter)
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(main)
                state["exp_avg_sq"] = torch.zeros_like(main)
                if copies:
                    state["master_param"] = main
        found: dict[str, Any] = original(self)
        return found

    DistributedOptimizer.state_dict = state_dict


PATCH = Patch(
    name="fresh_optimizer_state",
    scope="any",
    upstream="megatron/core/optimizer/distrib_optimizer.py:642",
    breaks="AssertionError in the first checkpoint, without Transformer Engine or apex",
    needed=torch_adam_is_used,
    apply=_apply,
    layers="torch",
)
