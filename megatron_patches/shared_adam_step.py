"""A resumed distributed optimizer with torch's Adam counts its steps many times over, silently.

`load_state_dict()` gives ONE `step` tensor to all parameters (optimizer/distrib_optimizer.py:838), and
Adam increments it once per parameter; `_set_main_param_and_optimizer_states` (:940) wants the very `step`
that the resharding load has dropped. Every parameter gets a step of its own.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron_patches.fresh_optimizer_state import torch_adam_is_used
from megatron_patches.patch import Patch


def _apply() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load, set_states = (
        DistributedOptimizer.load_state_dict,
        DistributedOptimizer._set_main_param_and_optimizer_states,
    )

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(set_states)
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        if "step" not in tensors:
            group, order = self.model_param_group_index_map[model_param]
            parameter = self.optimizer.param_groups[group]["params"][order]
            tensors = {**tensors, "step": self.optimizer.state[parameter]["step"].clone()}
        set_states(self, model_param, tensors)

    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states


PATCH = Patch(
    name="shared_adam_step",
    scope="any",
    upstream="megatron/core/optimizer/distrib_optimizer.py:838,940",
    breaks="the second update after a resume is wrong, without Transformer Engine or apex",
    needed=torch_adam_is_used,
    apply=_apply,
    layers="torch",
)
