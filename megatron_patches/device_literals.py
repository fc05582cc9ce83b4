"""Modules that write `device="cuda"` or compare with `"torch.cuda.FloatTensor"` as literals.

The literals are constants of compiled functions, so they are replaced there: nothing is copied, and a
module in which none is left (as moe_utils since 0.19) is left alone.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator
from typing import Any

from megatron_patches.patch import Patch

_MODULES = (
    "pipeline_parallel.schedules",
    "optimizer.optimizer",
    "optimizer.distrib_optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "transformer.moe.moe_utils",
    "utils",
    "tensor_parallel.data",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
)
_CPU_NAMES = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def _replaced(constant: Any) -> Any:
    match constant:
        case str():
            return _CPU_NAMES.get(constant, constant)
        case tuple():
            return tuple(map(_replaced, constant))
        case types.CodeType():
            constants = tuple(map(_replaced, constant.co_consts))
            return constant if constants == constant.co_consts else constant.replace(co_consts=constants)
    return constant


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Functions and methods that the module itself defines, under their decorators."""
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    for value in [*vars(module).values(), *(member for cls in classes for member in vars(cls).values())]:
        function = getattr(value, "__func__", value)
        function = getattr(function, "fget", None) or function
        function = getattr(function, "__wrapped__", function)
        if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
            yield function


def _stale(module_name: str) -> list[types.FunctionType]:
    module = importlib.import_module(f"megatron.core.{module_name}")
    return [f for f in _functions(module) if _replaced(f.__code__) is not f.__code__]


def _needed() -> bool:
    return any(_stale(name) for name in _MODULES)


def _apply() -> None:
    for name in _MODULES:
        for function in _stale(name):
            function.__code__ = _replaced(function.__code__)


PATCH = Patch(
    name="device_literals",
    scope="cpu",
    upstream="megatron/core: " + ", ".join(_MODULES),
    breaks="tensors are asked for on a device that is not there",
    needed=_needed,
    apply=_apply,
)
