"""Process groups: torch.distributed and megatron-core's parallel state, for one process or many."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass

import megatron.core  # noqa: F401  (the patches need it imported)
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

import megatron_patches
from spell_megatron.base import rendezvous
from spell_megatron.config import LayoutConfig
from spell_megatron.policy.layout import megatron_sizes
from spell_megatron.types import SpellError


@dataclass(frozen=True, slots=True)
class World:
    """Where this rank stands in the layout."""

    rank: int
    size: int
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    tensor_size: int
    first_stage: bool
    last_stage: bool
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 1 << 30


def _keep_freed_memory() -> None:
    """Have glibc reuse what tensors leave, not return it to the system: getting it again, page by page, takes up to
    a fifth of a training step. What is larger than a GiB still goes."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES - 1)


def start_world(layout: LayoutConfig, *, seed: int, timeout_seconds: float, secret: str = "") -> World:
    """Join the process group that RANK, WORLD_SIZE and MASTER_PORT tell of (or make one of a single process).

    Collectives that outlast `timeout_seconds` fail instead of hanging. Ranks that were given a `secret` let nobody
    in who does not know it: raises RendezvousError where somebody tries.
    """
    megatron_patches.apply()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        _keep_freed_memory()
    if not dist.is_initialized():
        rendezvous.join("cpu:gloo,cuda:nccl" if cuda else "gloo", secret, timeout_seconds)
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        **megatron_sizes(layout),
        distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
    )
    torch.manual_seed(seed)  # megatron's own seeding is a no-op without CUDA
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        data_rank=mpu.get_data_parallel_rank(),
        data_size=mpu.get_data_parallel_world_size(),
        context_rank=mpu.get_context_parallel_rank(),
        context_size=mpu.get_context_parallel_world_size(),
        tensor_size=mpu.get_tensor_model_parallel_world_size(),
        first_stage=mpu.is_pipeline_first_stage(ignore_virtual=True),
        last_stage=mpu.is_pipeline_last_stage(ignore_virtual=True),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
    )


def be_deterministic(device: torch.device) -> None:
    """From here on operations on a GPU give the same bits for the same inputs, or raise. Nothing to do on a CPU.

    SpellError where the process was started without what the libraries read as they load.
    """
    if device.type != "cuda":
        return
    wanted = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
    }
    missing = [f"{key}={value}" for key, value in wanted.items() if os.environ.get(key) != value]
    if missing:
        raise SpellError(f"policy.deterministic needs {' '.join(missing)} in the environment of every rank")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def stop_world() -> None:
    """Leave the process groups. Safe to call twice."""
    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
