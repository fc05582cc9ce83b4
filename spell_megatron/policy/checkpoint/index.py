"""The index of a distributed checkpoint, read without running anything that it says.

torch keeps the index as a pickle and opens it with a full unpickler (checkpoint/filesystem.py), and what the index
calls bytes, too (default_planner.py). Here every name in the pickle becomes a `_Record`: a class of this one
reading, which keeps what it is given and does nothing. The tree of records is then checked, and torch's own objects
are made of its numbers; torch is handed these, and never sees the file.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from spell_megatron.base.terminal import said
from spell_megatron.policy.checkpoint.boxes import Box, Shape
from spell_megatron.policy.checkpoint.files import TENSORS, read_bytes
from spell_megatron.types import SpellError

NAME = ".metadata"
_LARGEST = 1 << 29
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KNOWN = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
    },
}


class IndexFault(ValueError):
    """What is wrong with an index."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A rectangle of the tensor `key`, which has the shape `whole`, and where it was written."""

    key: str
    dtype: torch.dtype
    whole: Shape
    box: Box
    file: str
    offset: int
    length: int


def write_index(folder: Path, entries: Iterable[Entry]) -> None:
    """Write the index of the checkpoint in `folder`. Raises IndexFault where a tensor in it is not whole."""
    by_key: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_key[entry.key].append(entry)
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, parts in by_key.items():
        chunks = [ChunkStorageMetadata(torch.Size(e.box.start), torch.Size(e.box.size)) for e in parts]
        _check_whole(key, parts[0].whole, chunks)
        properties = TensorProperties(parts[0].dtype)
        tensors[key] = TensorStorageMetadata(properties, torch.Size(parts[0].whole), chunks)
        for entry in parts:
            place = _StorageInfo(entry.file, entry.offset, entry.length)
            places[MetadataIndex(key, torch.Size(entry.box.start))] = place
    (folder / NAME).write_bytes(pickle.dumps(Metadata(tensors, storage_data=places)))


def read_index(folder: Path) -> Metadata:
    """The index of the checkpoint in `folder`: tensors with their chunks, and where in which file each chunk is.

    Raises SpellError where it says anything else, or names what is not there; OSError where it cannot be read.
    """
    path = folder / NAME
    try:
        content = read_bytes(path, _LARGEST)
    except ValueError as error:
        raise SpellError(f"{path} is not the index of a checkpoint ({error}): nothing was read") from None
    try:
        return _checked(_Reader(io.BytesIO(content)).load(), _sizes(folder))
    except (KeyboardInterrupt, SystemExit, OSError):
        raise
    except BaseException as error:  # an unpickler raises whatever a hostile stream makes of it
        raise SpellError(
            f"{path} is not the index of a checkpoint ({said(error)[:200]}): nothing was read"
        ) from None


class _Record:
    """Something that the pickle names: its arguments and its state, as they stand there."""

    name = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __new__(cls, *arguments: Any) -> _Record:
        record = object.__new__(cls)
        record.__dict__.update(arguments=arguments, state=None)
        return record

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


class _Reader(pickle._Unpickler):
    """In Python: the one in C reserves memory for whatever number a stream claims."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._records: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> type[_Record]:
        if name not in _KNOWN.get(module, ()):
            raise IndexFault(f"it refers to {module}.{name}")
        full = f"{module}.{name}"
        return self._records.setdefault(full, type(name, (_Record,), {"name": full}))

    def get_extension(self, code: int) -> NoReturn:
        raise IndexFault("it refers to an extension")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise IndexFault("it refers to an object elsewhere")


def _checked(index: Any, sizes: Mapping[str, int]) -> Metadata:
    fields = _fields(index, "Metadata")
    tensors = {_text(name): _tensor(name, of) for name, of in _mapping(fields["state_dict_metadata"]).items()}
    places: dict[MetadataIndex, _StorageInfo] = {}
    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for key, value in _mapping(fields["storage_data"]).items():
        place = _place(value, sizes)
        entry = _fields(key, "MetadataIndex")
        name, offset = _text(entry["fqn"]), _numbers(entry["offset"])
        found[name].add(offset)
        places[MetadataIndex(name, offset)] = place
    for name, tensor in tensors.items():
        if found.pop(name, set()) != {tuple(chunk.offsets) for chunk in tensor.chunks}:
            raise IndexFault(f"the parts of {name} are not those that are stored")
    if found:
        raise IndexFault(f"{next(iter(found))} is stored and not described")
    return Metadata({**tensors}, storage_data=places, storage_meta=StorageMeta())


def _tensor(name: Any, value: Any) -> TensorStorageMetadata:
    fields = _fields(
        value, "TensorStorageMetadata", f"{name} is a pickled object, which is not read from files"
    )
    size = _numbers(fields["size"])
    chunks = [_chunk(name, size, chunk) for chunk in _list(fields["chunks"])]
    _check_whole(name, size, chunks)
    return TensorStorageMetadata(TensorProperties(_dtype(fields["properties"])), torch.Size(size), chunks)


def _check_whole(name: Any, size: Shape, chunks: Sequence[ChunkStorageMetadata]) -> None:
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise IndexFault(f"the parts of {name} do not make up the whole")
    if len({tuple(chunk.offsets) for chunk in chunks}) != len(chunks):
        raise IndexFault(f"two parts of {name} are in one place")


def _chunk(name: Any, whole: tuple[int, ...], value: Any) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    start, size = _numbers(fields["offsets"]), _numbers(fields["sizes"])
    if not len(start) == len(size) == len(whole) or any(
        a + b > c for a, b, c in zip(start, size, whole, strict=True)
    ):
        raise IndexFault(f"a part of {name} lies outside of it")
    return ChunkStorageMetadata(torch.Size(start), torch.Size(size))


def _place(value: Any, sizes: Mapping[str, int]) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    file = _text(fields["relative_path"])
    offset, length = _numbers((fields["offset"], fields["length"]))
    if file not in sizes:
        raise IndexFault(f"it refers to a file {file!r}")
    if offset + length > sizes[file]:
        raise IndexFault(f"it refers to what is beyond the end of {file}")
    if fields.get("transform_descriptors"):
        raise IndexFault("its tensors are transformed")
    return _StorageInfo(file, offset, length)


def _dtype(properties: Any) -> torch.dtype:
    if not isinstance(properties, _Record) or not isinstance(properties.state, tuple):
        raise IndexFault("a tensor has no properties")
    kind = properties.state[0]  # unpickled by name: the record itself, not one of its instances
    name = kind.name.removeprefix("torch.") if isinstance(kind, type) and issubclass(kind, _Record) else ""
    if name not in _DTYPES:
        raise IndexFault("a tensor has no dtype")
    return _DTYPES[name]


def _fields(record: Any, name: str, otherwise: str = "") -> Mapping[str, Any]:
    """What the object called `name` holds."""
    if not isinstance(record, _Record) or record.name.rpartition(".")[2] != name:
        raise IndexFault(otherwise or f"it has no {name} where one belongs")
    return _mapping(record.state)


def _numbers(value: Any) -> tuple[int, ...]:
    """The numbers of a tuple, or of what pickle makes of a `torch.Size`: `Size((2, 3))`."""
    if isinstance(value, _Record) and value.name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple) or not all(type(one) is int and 0 <= one < 1 << 62 for one in value):
        raise IndexFault("it has no sizes where they belong")
    return value


def _mapping(value: Any) -> Mapping[Any, Any]:
    if type(value) is not dict:
        raise IndexFault("it has no table where one belongs")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise IndexFault("it has no list where one belongs")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise IndexFault("it has no name where one belongs")
    return value


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files that an index may refer to."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix == TENSORS}
