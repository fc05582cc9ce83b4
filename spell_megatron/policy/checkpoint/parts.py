"""The parts of a learner's tensors that this rank saves and loads, each a rectangle of a tensor of the whole model.

Nothing is gathered and nothing copied: a part is a view of memory that the learner works with. Where data-parallel
ranks hold copies, each saves a share of them; of a distributed optimizer's parameters, the run whose state it holds,
which is also what the others get from it after every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from spell_megatron.policy.checkpoint.boxes import Box, Shape, run_boxes
from spell_megatron.policy.checkpoint.shares import Share
from spell_megatron.policy.learner import HeldPolicy, Learner


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A rectangle of the tensor `key` of the whole model, which has the shape `whole`, and this rank's memory of it."""

    key: str
    whole: Shape
    box: Box
    data: Tensor


def saved_parts(learner: HeldPolicy, held: Sequence[Share]) -> list[TensorPart]:
    """What this rank writes; every element of the model is written by one rank."""
    return list(_parts(learner, held, saving=True))


def loaded_parts(learner: HeldPolicy, held: Sequence[Share]) -> list[TensorPart]:
    """What this rank reads. Of weights that a distributed optimizer shares out, the rest is for the others to read."""
    return list(_parts(learner, held, saving=False))


def _parts(learner: HeldPolicy, held: Sequence[Share], *, saving: bool) -> Iterator[TensorPart]:
    by_parameter = {share.parameter: share for share in held}
    distributed = isinstance(learner, Learner) and learner.policy.optimizer.distributed
    for parameter, tiles in _tiles(learner):
        share = by_parameter.get(parameter)
        if distributed and parameter.requires_grad:
            run = (share.start, share.stop) if share else (0, 0)
        else:
            run = _even_share(parameter) if saving else (0, parameter.numel())
        state = share.tensors() if share else ()
        tensors = [("", 0, parameter.detach())]
        tensors += [
            (f"optimizer.state.{name}.", share.start if share else 0, tensor) for name, tensor in state
        ]
        for tile in tiles:
            if not (saving and any(tile.replica_id[:2])):  # another pipeline or tensor rank's copy
                for prefix, first, tensor in tensors:
                    yield from _cut(tile, parameter, run, prefix, first, tensor)


def _cut(
    tile: ShardedTensor, parameter: Tensor, run: tuple[int, int], prefix: str, first: int, tensor: Tensor
) -> Iterator[TensorPart]:
    """The parts of a tile that lie in a run of its parameter; `tensor` holds these elements from `first` on."""
    flat, ones = tensor.view(-1), (1,) * tile.prepend_axis_num
    begin = tile.data.storage_offset() - parameter.storage_offset()
    low, high = max(run[0], begin), min(run[1], begin + tile.data.numel())
    for box in run_boxes(tuple(tile.local_shape), low - begin, high - begin):
        offset = (*(0 for _ in ones), *box.start)
        start = tuple(a + b for a, b in zip(tile.global_offset, offset, strict=True))
        data = flat[low - first : low - first + box.numel].view(*ones, *box.size)
        yield TensorPart(prefix + tile.key, tuple(tile.global_shape), Box(start, tuple(data.shape)), data)
        low += box.numel


def _tiles(learner: HeldPolicy) -> Iterator[tuple[Tensor, list[ShardedTensor]]]:
    """Every tensor of the model, with the contiguous pieces of it that have a place in a whole one.

    Without the pickled `_extra_state` of layers, which holds the scales of FP8 and nothing else.
    """
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    for chunk in learner.chunks:
        for entry in chunk.sharded_state_dict(metadata=metadata).values():
            if isinstance(entry, ShardedTensorFactory):
                yield entry.data, list(nested_values(entry.build()))
            elif not isinstance(entry, ShardedObject):
                yield entry.data, [entry]


def _even_share(parameter: Any) -> tuple[int, int]:
    """This rank's run of a parameter of which other data-parallel ranks have copies."""
    if getattr(parameter, "allreduce", True):
        group = mpu.get_data_parallel_group(with_context_parallel=True)
    else:
        group = mpu.get_expert_data_parallel_group()
    rank, ranks, numel = group.rank(), group.size(), parameter.numel()
    return numel * rank // ranks, numel * (rank + 1) // ranks
