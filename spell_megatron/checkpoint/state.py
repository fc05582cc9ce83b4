"""A learner's state as megatron-core's distributed checkpoints know it: what is in it, and taking it over."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as strategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from spell_megatron.checkpoint.faults import reason
from spell_megatron.checkpoint.files import read_bytes
from spell_megatron.checkpoint.folder import Checkpoint
from spell_megatron.checkpoint.index import read_index
from spell_megatron.policy.learner import Learner
from spell_megatron.types import SpellError

_LARGEST_VALUES = 1 << 28


def load_learner(learner: Learner, checkpoint: Checkpoint) -> None:
    """Take over the state of a checkpoint in this learner's own layout. A collective.

    Raises SpellError where it is another model's, cannot be read, or holds more than tensors and plain values.
    """
    folder = checkpoint.learner
    try:
        index = read_index(folder)
        fresh = _plain_values(folder)["schedule"]["num_steps"] == 0
        with _reading(index):
            state = dist_checkpointing.load(learner_state(learner, loading=True, fresh=fresh), str(folder))
    except SpellError:
        raise
    except (Exception, CheckpointException) as error:
        raise SpellError(f"the checkpoint {checkpoint.path} cannot be taken over: {reason(error)}") from error
    for index, chunk in enumerate(learner.chunks):
        chunk.load_state_dict(state[_chunk_key(learner, index)], strict=False)
    if not fresh:
        learner.optimizer.load_state_dict(state["optimizer"])
        for group in learner.optimizer.param_groups:  # they are restored with the rates of the checkpoint
            group["max_lr"], group["min_lr"] = learner.schedule.max_lr, learner.schedule.min_lr
    learner.schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"])


def learner_state(learner: Learner, *, loading: bool, fresh: bool) -> dict[str, Any]:
    """Weights, optimizer, schedule and random state; tensors know their place in the whole model.

    Before its first step an optimizer has no state: that of a `fresh` one is left out.
    """
    metadata = {
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",  # the one that survives a change of layout
    }
    models = {
        _chunk_key(learner, index): _tensors(chunk.sharded_state_dict(metadata=metadata))
        for index, chunk in enumerate(learner.chunks)
    }
    optimizer: dict[str, Any] = {}
    if not fresh:
        state = learner.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
        optimizer = {"optimizer": state}
    return {
        **models,
        **optimizer,
        "schedule": learner.schedule.state_dict(),
        "rng": torch.get_rng_state(),
    }


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Without the pickled `_extra_state` of layers, which holds the scales of FP8 and nothing else."""
    return {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}


def _plain_values(folder: Path) -> dict[str, Any]:
    """What of a state is no tensor. Raises SpellError where it is more than tensors and plain values."""
    path = folder / "common.pt"
    try:
        content = read_bytes(path, _LARGEST_VALUES)
        if sum(one.file_size for one in zipfile.ZipFile(io.BytesIO(content)).infolist()) > _LARGEST_VALUES:
            raise ValueError("it unpacks to more than it may")
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(values["schedule"]["num_steps"], int):
            raise TypeError("it has no number of steps")
    except OSError:
        raise
    except Exception as error:  # an unpickler raises whatever a hostile stream makes of it
        said = str(error).splitlines()[:1] or [type(error).__name__]
        raise SpellError(f"{path} holds no plain values ({said[0][:200]}): nothing was read") from None
    return values


@contextmanager
def _reading(index: Metadata) -> Iterator[None]:
    """Megatron-core reads distributed files by this index, and none from disk, until the block ends."""

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return index

    original = strategy._get_filesystem_reader
    strategy._get_filesystem_reader = lambda folder, *args, **kwargs: Reader(folder)
    try:
        yield
    finally:
        strategy._get_filesystem_reader = original


def _chunk_key(learner: Learner, index: int) -> str:
    """Megatron-core's names: `model`, or `model0`, `model1` … where the schedule is interleaved."""
    return "model" if len(learner.chunks) == 1 else f"model{index}"
