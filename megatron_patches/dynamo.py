"""`jit_fuser` compiles small functions with torch.compile (megatron/core/jit.py:10).

On a CPU that starts minutes of C++ builds for functions that run in microseconds.
"""

from __future__ import annotations

import torch

from megatron_patches.patch import Patch


def _needed() -> bool:
    from megatron.core import jit

    return jit.jit_fuser is not None


def _apply() -> None:
    torch._dynamo.config.disable = True


PATCH = Patch(
    name="dynamo",
    scope="cpu",
    upstream="megatron/core/jit.py:10",
    breaks="start-up takes minutes: each fused function is built by a C++ compiler",
    needed=_needed,
    apply=_apply,
)
