"""Asynchronous saving asks for NVIDIA's resiliency extension, which megatron-core does not depend on.

Since 0.19 `dist_checkpointing.save(async_sharded_save=True)` takes `async_strategy="nvrx"` unless told otherwise
(serialization.py:359), in an argument that earlier versions do not know. Where the extension is missing,
megatron-core's own writer answers.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from megatron_patches.patch import Patch


def _module() -> Any:
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    return strategies


def _needed() -> bool:
    return hasattr(_module(), "get_async_strategy") and not importlib.util.find_spec("nvidia_resiliency_ext")


def _apply() -> None:
    original = _module().get_async_strategy

    @functools.wraps(original)
    def get_async_strategy(_wanted: str = "mcore", module: str | None = None) -> Any:
        return original("mcore", module)

    _module().get_async_strategy = get_async_strategy


PATCH = Patch(
    name="resiliency_default",
    scope="any",
    upstream="megatron/core/dist_checkpointing/serialization.py:359",
    breaks="ModuleNotFoundError: nvidia_resiliency_ext, at the first checkpoint",
    needed=_needed,
    apply=_apply,
    versions=("0.19.2",),
)
