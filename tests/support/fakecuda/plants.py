"""Faults that are put into a learner, so that it can be seen that they are found: `WHAT in WHERE`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor


def _item(x: Tensor) -> Tensor:
    x.sum().item()
    return x


_WHAT: dict[str, Callable[[Tensor], Tensor]] = {
    "item": _item,
    "host memory": lambda x: x.cpu(),
    "float32": lambda x: x.float(),
}
_WHERE = {
    "attention": ("spell_megatron.policy.attention", "attend"),
    "an expert": ("spell_megatron.policy.layers", "_PerExpert.apply"),
    "the head": ("spell_megatron.policy.model", "token_logprobs"),
    "te's products": ("transformer_engine.pytorch.module.layernorm_linear", "general_gemm"),
    "te's experts": ("megatron.core.transformer.moe.experts", "TEGroupedMLP.forward"),
}


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """Inside, a function does something to the first tensor that it is given, before."""
    if not fault:
        yield
        return
    what, where = fault.split(" in ")
    change, (module, path) = _WHAT[what], _WHERE[where]
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        first = next(index for index, value in enumerate(args) if isinstance(value, Tensor))
        return original(*args[:first], change(args[first]), *args[first + 1 :], **kwargs)

    with patch.object(owner, name, call):
        yield
