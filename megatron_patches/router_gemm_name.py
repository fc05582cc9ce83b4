"""`te_general_gemm` is used by the router but only bound where Transformer Engine imports.

moe_utils.py:25 imports it in a `try` whose `except` forgets the fallback; :1192 and :1225 read it.
"""

from __future__ import annotations

from megatron_patches.patch import Patch


def _needed() -> bool:
    from megatron.core.transformer.moe import moe_utils

    return not hasattr(moe_utils, "te_general_gemm")


def _apply() -> None:
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


PATCH = Patch(
    name="router_gemm_name",
    scope="any",
    upstream="megatron/core/transformer/moe/moe_utils.py:25,1192,1225",
    breaks="NameError in the router of a mixture of experts, on any machine without Transformer Engine",
    needed=_needed,
    apply=_apply,
    layers="torch",
    versions=("0.16.1",),
)
