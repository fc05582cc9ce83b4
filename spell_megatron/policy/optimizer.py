"""Megatron's optimizer and learning-rate schedule, from our configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from spell_megatron.config import OptimizerConfig


def wrap_data_parallel(chunks: Sequence[Any], optimizer: OptimizerConfig) -> list[DistributedDataParallel]:
    """Give every chunk gradient buffers in float32 that are reduced over the data-parallel ranks."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optimizer.distributed,
        overlap_grad_reduce=optimizer.overlap,
        overlap_param_gather=optimizer.overlap,
    )
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], optimizer: OptimizerConfig, dtype: torch.dtype
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with float32 master weights, and the schedule: linear warm-up, then constant or cosine."""
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=optimizer.distributed,
        overlap_param_gather=optimizer.overlap,
        optimizer_cpu_offload=optimizer.cpu_offload,
        optimizer_offload_fraction=1.0 if optimizer.cpu_offload else 0.0,
        use_precision_aware_optimizer=optimizer.cpu_offload,
    )
    megatron = get_megatron_optimizer(config, list(chunks))
    schedule = OptimizerParamScheduler(
        megatron,
        init_lr=optimizer.lr / (optimizer.warmup_steps + 1),  # the first step is one, too
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=optimizer.warmup_steps,
        lr_decay_steps=max(optimizer.decay_steps, optimizer.warmup_steps + 1),
        lr_decay_style="cosine" if optimizer.decay_steps else "constant",
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run's own rate, not that of its checkpoint
    )
    return megatron, schedule


def main_gradient(weight: Tensor) -> Tensor:
    """The float32 gradient of a parameter, which Megatron adds up in a buffer of its own."""
    gradient: Tensor = weight.main_grad  # type: ignore[attr-defined]
    return gradient
