"""Corrections of megatron-core, one file each.

`apply()` is called once, before anything of megatron-core is built. Nothing is patched on a machine
with CUDA but what is wrong there too.
"""

from __future__ import annotations

import functools
import logging

import torch

from megatron_patches import (
    alltoall_stream,
    checkpoint_writer,
    common_values,
    cpu_products,
    cuda_names,
    device_literals,
    dynamo,
    eager_swiglu,
    expert_gradients,
    fresh_optimizer_state,
    interleaved_shapes,
    local_norm,
    offload_on_host,
    offloaded_classes,
    resiliency_default,
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
    eager_swiglu.PATCH,
    te_version.PATCH,
    router_gemm_name.PATCH,
    expert_gradients.PATCH,
    fresh_optimizer_state.PATCH,
    shared_adam_step.PATCH,
    offloaded_classes.PATCH,
    checkpoint_writer.PATCH,
    resiliency_default.PATCH,
    common_values.PATCH,
    interleaved_shapes.PATCH,
    local_norm.PATCH,
)

_log = logging.getLogger(__name__)


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
        if not patch.needed():
            _log.warning("patch %s is not needed any more: %s mends it", patch.name, patch.upstream)
            continue
        patch.apply()
        applied.append(patch.name)
    return tuple(applied)
