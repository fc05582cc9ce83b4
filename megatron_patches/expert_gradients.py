"""Gradients of experts are summed over the wrong ranks where TP > 1 and neither EP nor expert TP is used.

`param.allreduce` decides whether a weight is reduced over the data-parallel or the expert-data-parallel
ranks; upstream clears it only when EP > 1 (tensor_parallel/layers.py:886,1209 and
extensions/transformer_engine.py:1551). With TP 2, EP 1, expert TP 1 the two groups differ, and the
gradients are off by more than their own size. It is cleared on every expert weight as it joins DDP.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from megatron_patches.patch import Patch


def _needed() -> bool:
    from megatron.core.tensor_parallel import layers

    return "expert_model_parallel_size > 1" in inspect.getsource(layers.ColumnParallelLinear.__init__) or (
        "expert_parallel" in inspect.getsource(layers.ColumnParallelLinear.__init__)
    )


def _apply() -> None:
    from megatron.core.distributed import DistributedDataParallel

    original = DistributedDataParallel.__init__

    @functools.wraps(original)
    def init(self: Any, config: Any, ddp_config: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        for name, parameter in module.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False
        original(self, config, ddp_config, module, *args, **kwargs)

    DistributedDataParallel.__init__ = init


PATCH = Patch(
    name="expert_gradients",
    scope="any",
    upstream="megatron/core/tensor_parallel/layers.py:886,1209; extensions/transformer_engine.py:1551",
    breaks="wrong expert gradients for TP > 1, EP = 1, expert TP = 1",
    needed=_needed,
    apply=_apply,
)
