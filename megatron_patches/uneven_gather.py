"""Gloo gathers and scatters equal parts only; NCCL takes uneven ones.

Expert tensor parallelism together with expert parallelism moves as many rows as each rank's tokens were
routed to (tensor_parallel/mappings.py:147,187). Parts are padded to the longest and cut afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_patches.patch import Patch


def _mappings() -> Any:
    from megatron.core.tensor_parallel import mappings

    return mappings


def _needed() -> bool:
    return not torch.cuda.is_available()


def _padded(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - x.shape[0]))


def _apply() -> None:
    mappings = _mappings()
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_along_first_dim(
        x: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            whole: Tensor = gather(x, group, output_split_sizes, use_global_buffer)
            return whole
        sizes = [int(size) for size in output_split_sizes]
        parts = [x.new_empty(max(sizes), *x.shape[1:]) for _ in sizes]
        dist.all_gather(parts, _padded(x, max(sizes)).contiguous(), group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_along_first_dim(
        x: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            part: Tensor = reduce_scatter(x, group, input_split_sizes, use_global_buffer)
            return part
        sizes = [int(size) for size in input_split_sizes]
        parts = [_padded(rows, max(sizes)).contiguous() for rows in torch.split(x, sizes)]
        output = torch.empty_like(parts[0])
        dist.reduce_scatter(output, parts, group=group)
        return output[: sizes[group.rank()]]

    mappings._gather_along_first_dim = gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim


PATCH = Patch(
    name="uneven_gather",
    scope="cpu",
    upstream="megatron/core/tensor_parallel/mappings.py:147,187",
    breaks="expert TP > 1 with EP > 1: ProcessGroupGloo: invalid tensor size",
    needed=_needed,
    apply=_apply,
)
