"""A learner's state as megatron-core's distributed checkpoints know it: what is in it, and taking it over."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import ShardedObject
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from spell_megatron.checkpoint.folder import Checkpoint
from spell_megatron.policy.learner import Learner
from spell_megatron.types import SpellError


def load_learner(learner: Learner, checkpoint: Checkpoint) -> None:
    """Take over the state of a checkpoint in this learner's own layout. A collective.

    Raises SpellError where it is another model's, or where its files hold more than tensors and plain values.
    """
    folder = checkpoint.learner
    refuse_code(folder / ".metadata")
    try:
        fresh = dist_checkpointing.load_common_state_dict(str(folder))["schedule"]["num_steps"] == 0
        state = dist_checkpointing.load(learner_state(learner, loading=True, fresh=fresh), str(folder))
    except Exception as error:
        raise SpellError(
            f"the checkpoint {checkpoint.path} does not fit the configured model: {error}"
        ) from error
    for index, chunk in enumerate(learner.chunks):
        chunk.load_state_dict(state[_chunk_key(learner, index)], strict=False)
    if not fresh:
        learner.optimizer.load_state_dict(state["optimizer"])
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


def refuse_code(metadata: Path) -> None:
    """Raise SpellError where the pickled index of a distributed checkpoint could run code.

    torch unpickles the index without a check (checkpoint/filesystem.py:930), and what the index calls bytes, too
    (default_planner.py:387); everything else is read as tensors and plain values only.
    """
    try:
        with metadata.open("rb") as file:
            index = _IndexReader(file).load()
        stored = index.state_dict_metadata.items()
        hidden = [name for name, kind in stored if isinstance(kind, BytesStorageMetadata)]
    except Exception as error:  # an unpickler raises whatever a hostile stream makes of it
        raise SpellError(f"{metadata} is not the index of a checkpoint ({error}): nothing was read") from None
    if hidden:
        raise SpellError(f"{metadata} lists pickled objects ({hidden[0]} …), which are not read from files")


class _IndexReader(pickle.Unpickler):
    """Knows the names that an index is made of, and no function that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


_INDEX_NAMES = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
    },
}


def _chunk_key(learner: Learner, index: int) -> str:
    """Megatron-core's names: `model`, or `model0`, `model1` … where the schedule is interleaved."""
    return "model" if len(learner.chunks) == 1 else f"model{index}"
