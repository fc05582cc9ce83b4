"""Corrections of megatron-core, one file each.

`apply()` is called once, before anything of megatron-core is built. On a machine with CUDA, only
what is wrong there too is patched.
"""

from __future__ import annotations

import functools
import logging

import torch

from megatron_patches import (
    alltoall_stream,
    cpu_products,
    cuda_names,
    deepep_multihot,
    device_literals,
    dynamo,
    eager_rotation,
    eager_swiglu,
    expert_gradients,
    fresh_optimizer_state,
    fusion_without_apex,
    interleaved_shapes,
    local_norm,
    offload_on_host,
    offloaded_classes,
    rng_tracker,
    router_gemm_name,
    shared_adam_step,
    te_version,
    uneven_gather,
)
from megatron_patches.patch import Patch
from megatron_patches.versions import TESTED, installed, warn_if_untested

PATCHES: tuple[Patch, ...] = (
    dynamo.PATCH,
    cuda_names.PATCH,
    rng_tracker.PATCH,
    alltoall_stream.PATCH,
    device_literals.PATCH,
    uneven_gather.PATCH,
    offload_on_host.PATCH,
    cpu_products.PATCH,
    eager_rotation.PATCH,
    eager_swiglu.PATCH,
    te_version.PATCH,
    router_gemm_name.PATCH,
    expert_gradients.PATCH,
    deepep_multihot.PATCH,
    fresh_optimizer_state.PATCH,
    shared_adam_step.PATCH,
    offloaded_classes.PATCH,
    interleaved_shapes.PATCH,
    local_norm.PATCH,
    fusion_without_apex.PATCH,
)

_WITH = {"torch": "with", "te": "without"}
_log = logging.getLogger(__name__)


def has_transformer_engine() -> bool:
    """Whether megatron-core takes its kernels from there."""
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    return bool(HAVE_TE)


@functools.cache
def apply() -> tuple[str, ...]:
    """Apply every patch that this machine needs; return their names."""
    warn_if_untested()
    applied = []
    for patch in PATCHES:
        if patch.scope == "cpu" and torch.cuda.is_available():
            continue
        if installed() in TESTED and installed() not in patch.versions:
            continue
        if patch.layers not in ("any", "te" if has_transformer_engine() else "torch"):
            _log.debug("patch %s is not needed %s Transformer Engine", patch.name, _WITH[patch.layers])
            continue
        if not patch.needed():
            _log.warning("patch %s is not needed any more: %s mends it", patch.name, patch.upstream)
            continue
        patch.apply()
        applied.append(patch.name)
    return tuple(applied)
