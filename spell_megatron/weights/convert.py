"""Weights between a model folder and this rank's Megatron parameters, both ways, streamed.

`load_weights` reads only the slices that the rank holds. `stream_weights` yields full Hugging Face tensors
one after another: tensor-parallel parts and experts are gathered, then broadcast over the pipeline, so no
rank ever holds the model. Export to disk and resync of the rollout engine both consume that stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from spell_megatron.weights.families import Family
from spell_megatron.weights.files import ModelFolder
from spell_megatron.weights.names import Weight, weights_of
from spell_megatron.weights.shape import ModelShape
from spell_megatron.weights.table import Split


@torch.no_grad()
def load_weights(chunks: Sequence[Any], shape: ModelShape, folder: ModelFolder) -> None:
    """Fill the parameters of this rank's pipeline chunks from a model folder."""
    for weight in weights_of(chunks, shape.family, shape.tied):
        expert = _global_expert(weight, shape, mpu.get_expert_model_parallel_rank())
        names = [name.format(expert=expert) for name in weight.hf_names]
        weight.parameter.copy_(_read(folder, names, weight, shape))


def stream_weights(
    chunks: Sequence[Any],
    shape: ModelShape,
    value: Callable[[Tensor], Tensor] | None = None,
    family: Family | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield `(Hugging Face name, full tensor)` for every weight, in one order, on every rank.

    A collective: every rank must consume the whole stream. What needs no gathering is not copied, so tensors
    may be views of the live parameters: use or copy them before the next update. `value` maps a parameter
    to what is streamed of it (its gradient, in tests). The names are those of `family`, the model's own if None.
    """
    pipeline = mpu.get_pipeline_model_parallel_group()
    stage, stages = dist.get_rank(pipeline), dist.get_world_size(pipeline)
    weights = weights_of(chunks, family or shape.family, shape.tied)
    local = {weight.order: weight for weight in weights if not weight.shadow}
    owners: dict[tuple[int, ...], int] = dict.fromkeys(local, stage)
    if stages > 1:
        gathered: list[Any] = [None] * stages
        dist.all_gather_object(gathered, list(local), group=pipeline)
        owners = {order: owner for owner, orders in enumerate(gathered) for order in orders}
    for order in sorted(owners):
        weight = local.get(order)
        full = None
        if weight is not None:
            tensor = weight.parameter.data if value is None else value(weight.parameter)
            full = _gather(tensor, weight, shape)
        yield from _over_pipeline(full, weight, owners[order], pipeline)


def _over_pipeline(
    full: list[tuple[str, Tensor]] | None, weight: Weight | None, owner: int, pipeline: Any
) -> Iterator[tuple[str, Tensor]]:
    if dist.get_world_size(pipeline) == 1:
        assert full is not None
        yield from full
        return
    source = dist.get_global_rank(pipeline, owner)
    described: list[Any] = [
        [(name, t.shape, t.dtype) for name, t in full] if full and dist.get_rank(pipeline) == owner else None
    ]
    dist.broadcast_object_list(described, src=source, group=pipeline)
    for i, (name, size, dtype) in enumerate(described[0]):
        if full is not None and dist.get_rank(pipeline) == owner:
            tensor = full[i][1].contiguous()
        else:
            tensor = torch.empty(size, dtype=dtype, device=torch.cuda.current_device())
        dist.broadcast(tensor, src=source, group=pipeline)
        yield name, tensor


def _read(folder: ModelFolder, names: Sequence[str], weight: Weight, shape: ModelShape) -> Tensor:
    """This rank's part of a parameter, merged from the Hugging Face tensors it is made of."""
    _, rank = _tp(weight)
    local = weight.parameter.shape
    match weight.split:
        case Split.REPLICATED:
            return folder.read(names[0])
        case Split.COLUMN:
            name = names[0] if names[0] in folder or not shape.tied else shape.family.head
            return folder.read(name, slice(rank * local[0], (rank + 1) * local[0]))
        case Split.ROW:
            return folder.read(names[0], columns=slice(rank * local[1], (rank + 1) * local[1]))
        case Split.GATED:
            half = local[0] // 2
            return torch.cat([folder.read(name, slice(rank * half, (rank + 1) * half)) for name in names])
        case Split.QKV:
            # With fewer key-value heads than ranks a rank's rows begin inside a head: read whole, then cut.
            heads = _heads_per_group(shape)
            unit = sum(heads) * shape.head_dim
            first, end = rank * local[0], (rank + 1) * local[0]
            groups = range(first // unit, -(-end // unit))
            parts = [
                folder.read(name, slice(groups.start * n * shape.head_dim, groups.stop * n * shape.head_dim))
                for name, n in zip(names, heads, strict=True)
            ]
            offset = groups.start * unit
            return _merge_qkv(parts, len(groups))[first - offset : end - offset]


def _gather(tensor: Tensor, weight: Weight, shape: ModelShape) -> list[tuple[str, Tensor]]:
    """The full Hugging Face tensors of a parameter (of one expert of every EP rank, for experts)."""
    group = _tp_group(weight)
    match weight.split:
        case Split.REPLICATED:
            fulls = [tensor]
        case Split.COLUMN:
            fulls = [_all_gather(tensor, group)]
        case Split.ROW:
            fulls = [_join(_all_gather(tensor, group).chunk(dist.get_world_size(group)), 1)]
        case Split.GATED:
            fulls = [_all_gather(half, group) for half in tensor.chunk(2)]
        case Split.QKV:
            fulls = _split_qkv(_all_gather(tensor, group), shape)
    if weight.expert is None:
        return list(zip(weight.hf_names, fulls, strict=True))
    experts = mpu.get_expert_model_parallel_group()
    copies = [_all_gather(full, experts).chunk(dist.get_world_size(experts)) for full in fulls]
    return [
        (name.format(expert=_global_expert(weight, shape, rank)), copy)
        for name, everyones in zip(weight.hf_names, copies, strict=True)
        for rank, copy in enumerate(everyones)
    ]


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def _heads_per_group(shape: ModelShape) -> tuple[int, int, int]:
    """Query, key and value heads that stand together in Megatron's merged projection."""
    return shape.heads // shape.kv_heads, 1, 1


def _merge_qkv(parts: Sequence[Tensor], groups: int) -> Tensor:
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)


def _split_qkv(merged: Tensor, shape: ModelShape) -> list[Tensor]:
    sizes = [n * shape.head_dim for n in _heads_per_group(shape)]
    return [part.flatten(0, 1) for part in merged.unflatten(0, (shape.kv_heads, -1)).split(sizes, 1)]


def _global_expert(weight: Weight, shape: ModelShape, ep_rank: int) -> int:
    if weight.expert is None:
        return 0
    ranks: int = mpu.get_expert_model_parallel_world_size()
    return ep_rank * (shape.experts // ranks) + weight.expert


def _tp_group(weight: Weight) -> Any:
    if weight.expert is None:
        return mpu.get_tensor_model_parallel_group()
    return mpu.get_expert_tensor_parallel_group()


def _tp(weight: Weight) -> tuple[int, int]:
    group = _tp_group(weight)
    return dist.get_world_size(group), dist.get_rank(group)


def _all_gather(tensor: Tensor, group: Any) -> Tensor:
    """The rows of all ranks, `[rows * size, …]`; the tensor itself where there is one rank."""
    size = dist.get_world_size(group)
    if size == 1:
        return tensor
    full = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(full, tensor.contiguous(), group=group)
    return full
