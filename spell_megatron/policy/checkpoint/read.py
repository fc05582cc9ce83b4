"""Reading a checkpoint's tensors: the rectangles that a rank wants, out of those that are stored, in place.

Each rank reads for itself, and no more than the stored rectangles that its own overlap.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from spell_megatron.policy.checkpoint.boxes import Box, Overlaps, Shape
from spell_megatron.policy.checkpoint.files import open_plain
from spell_megatron.policy.checkpoint.parts import TensorPart

_OVERHEAD = 1 << 16
"""Bytes that a tensor's record may have besides its elements."""
_OTHER_NAMES = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_)?")
"""What megatron-core itself may call a state of the optimizer."""
_STATE = re.compile(r"^optimizer\.state\.\w+\.")
_MASTERS = "optimizer.state.param."
"""Float32 copies of weights; those of a float32 run are the weights, and stored as such alone."""


@dataclass(frozen=True, slots=True, order=True)
class _Stored:
    """A rectangle in a file."""

    file: str
    offset: int
    length: int
    size: Shape
    largest: int
    """Bytes that it may unpack to."""


def read_parts(folder: Path, index: Metadata, parts: Iterable[TensorPart]) -> int:
    """Fill the parts from the files of a checkpoint; the bytes of the tensors that were read for it.

    Raises ValueError where they are another model's, OSError where they cannot be read.
    """
    wanted: dict[_Stored, list[tuple[Box, Tensor]]] = defaultdict(list)
    by_key: dict[str, list[TensorPart]] = defaultdict(list)
    for part in parts:
        by_key[part.key].append(part)
    names = {_OTHER_NAMES.sub("optimizer.state.", name): name for name in index.state_dict_metadata}
    for key, mine in by_key.items():
        name = names[_best(key, mine[0].data.dtype, names)]
        for stored, there, target in _overlapping(index, name, mine):
            wanted[stored].append((there, target))
    read = 0
    for file, group in groupby(sorted(wanted), attrgetter("file")):
        with open_plain(folder / file) as stream:
            for stored in group:
                stream.seek(stored.offset)
                tensor = load_plain(stream.read(stored.length), stored.largest)
                if not isinstance(tensor, Tensor) or tensor.shape != stored.size:
                    raise ValueError(f"{file} holds something else than the index says")
                for there, target in wanted[stored]:
                    target.copy_(tensor[_slices(there)])
                read += tensor.nbytes
    return read


def load_plain(content: bytes, largest: int) -> Any:
    """Tensors and plain values that torch has saved. Raises whatever an unpickler makes of anything else."""
    if sum(one.file_size for one in zipfile.ZipFile(io.BytesIO(content)).infolist()) > largest:
        raise ValueError("it unpacks to more than it may")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _best(key: str, dtype: torch.dtype, names: Container[str]) -> str:
    """The key that the parts of `key` are read from: between weights and their float32 copies, where `policy.dtype` is
    not that of the checkpoint, the more precise that there is.

    Raises ValueError where nothing stands for it.
    """
    weights = _STATE.sub("", key)
    if key == _MASTERS + weights or (key == weights and dtype is torch.float32):
        choices: tuple[str, ...] = (_MASTERS + weights, weights)
    else:
        choices = (key,)
    if found := next((choice for choice in choices if choice in names), ""):
        return found
    if weights in names:
        raise ValueError(
            f"it has {weights}, and nothing that an optimizer knew of it: a run with policy.freeze_router=true does not"
            " train its routers. Leave the key true, or begin a new run with what `spell-megatron export-hf` makes of"
            " this one"
        )
    raise ValueError(f"{key} is missing: it is another model's")


def _overlapping(
    index: Metadata, name: str, parts: list[TensorPart]
) -> Iterable[tuple[_Stored, Box, Tensor]]:
    """What is stored of the parts of one tensor: where, what of that, and where it belongs."""
    described = index.state_dict_metadata[name]
    assert isinstance(described, TensorStorageMetadata)  # an index has nothing else
    if tuple(described.size) != parts[0].whole:
        raise ValueError(f"{name} is {[*described.size]} and not {[*parts[0].whole]}: it is another model's")
    boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in described.chunks]
    overlaps = Overlaps(boxes)
    for part in parts:
        found = 0
        for number, there, here in overlaps.of(part.box):
            place = index.storage_data[MetadataIndex(name, torch.Size(boxes[number].start))]
            largest = boxes[number].numel * described.properties.dtype.itemsize + _OVERHEAD
            stored = _Stored(place.relative_path, place.offset, place.length, boxes[number].size, largest)
            found += here.numel
            yield stored, there, part.data[_slices(here)]
        if found != part.box.numel:
            raise ValueError(f"the parts of {name} do not make up the whole")


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))
