"""Products that add a weight's gradient to its float32 sum are refused where apex is missing.

Transformer Engine has such products itself, but megatron-core's own linear layer, which the head is, asks for apex's as
soon as the key is set (tensor_parallel/layers.py:924). Nobody calls that layer here: the head has its own products.
"""

from __future__ import annotations

from typing import Any

from megatron_patches.patch import Patch


def _layers() -> Any:
    from megatron.core.tensor_parallel import layers

    return layers


def _needed() -> bool:
    return not _layers()._grad_accum_fusion_available


def _apply() -> None:
    _layers()._grad_accum_fusion_available = True


PATCH = Patch(
    name="fusion_without_apex",
    scope="any",
    upstream="megatron/core/tensor_parallel/layers.py:924",
    breaks="RuntimeError where policy.fusions.weight_gradients is on",
    needed=_needed,
    apply=_apply,
    layers="te",
)
