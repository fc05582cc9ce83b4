"""Program of test_checkpoint_index.py: reads hostile indexes of a checkpoint, and tells what they came to.

    python hostile_indexes.py FOLDER COUNT      one JSON object: refused, taken, and what was run (nothing)

An audit hook sees whatever Python runs, opens to write, or imports, however it came to that; it cannot be taken away
again, so this is a process of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from spell_megatron.policy.checkpoint.index import NAME, read_index
from spell_megatron.types import SpellError

FILE, BYTES = "__0_0.distcp", 4096
_RUNS = (
    "os.",
    "subprocess.",
    "exec",
    "compile",
    "import",
    "ctypes",
    "socket.",
    "shutil.",
    "object.__setattr__",
)
_QUIET = {"os.listdir", "os.scandir"}


def index() -> Metadata:
    """An honest index: two tensors, one of them in two parts."""
    tensors, places = {}, {}
    for name, starts in {"weight": ((0, 0), (2, 0)), "bias": ((0, 0),)}.items():
        chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size((2, 3))) for start in starts]
        size = torch.Size((2 * len(starts), 3))
        tensors[name] = TensorStorageMetadata(TensorProperties(torch.bfloat16), size, chunks)
        for number, start in enumerate(starts):
            places[MetadataIndex(name, start, number)] = _StorageInfo(FILE, 100 * len(places), 100)
    return Metadata(tensors, planner_data=None, storage_data=places)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def name_of(cls: type) -> bytes:
    return pickle.GLOBAL + f"{cls.__module__}\n{cls.__qualname__}\n".encode()


def body(value: Any) -> bytes:
    """What pushes a value, without the start and the end of a pickle."""
    return pickle.dumps(value, 2)[2:-1]


def altered(cls: type, attribute: str, value: bytes) -> bytes:
    """Sets an attribute of a class by BUILD, then leaves an honest index on the stack."""
    state = pickle.NONE + pickle.EMPTY_DICT + body(attribute) + value + pickle.SETITEM + pickle.TUPLE2
    return pickle.PROTO + b"\x02" + name_of(cls) + state + pickle.BUILD + pickle.POP + _honest() + pickle.STOP


def _honest() -> bytes:
    return body(index())


def attacks(canary: str) -> dict[str, bytes]:
    """Streams by what they try."""
    command = body((f"touch {canary}",))
    start, system = pickle.PROTO + b"\x02", b"cos\nsystem\n"
    hidden = index()
    hidden.state_dict_metadata["weight"] = BytesStorageMetadata()
    elsewhere = index()
    for place in elsewhere.storage_data.values():
        place.relative_path = "../../secret"
    transformed = index()
    for place in transformed.storage_data.values():
        place.transform_descriptors = ["gzip"]
    return {
        "call": pickle.dumps(Call(os.system, f"touch {canary}")),
        "call in old words": start + system + command + pickle.REDUCE + pickle.STOP,
        "inst": b"(" + body(f"touch {canary}") + b"ios\nsystem\n" + pickle.STOP,
        "obj": start + b"(" + system + body(f"touch {canary}") + pickle.OBJ + pickle.STOP,
        "newobj of a function": start + system + command + pickle.NEWOBJ + pickle.STOP,
        "call beside an index": start
        + system
        + command
        + pickle.REDUCE
        + pickle.POP
        + _honest()
        + pickle.STOP,
        "stack global": pickle.dumps(Call(eval, f"open({canary!r}, 'w')"), 4),
        "getattr": start + b"cbuiltins\ngetattr\n" + pickle.STOP,
        "partial": start + b"cfunctools\npartial\n" + pickle.STOP,
        "torch.load": start + b"ctorch\nload\n" + body((canary,)) + pickle.REDUCE + pickle.STOP,
        "attribute of an allowed class": altered(Metadata, "__setstate__", name_of(SavePlan)),
        "default of an allowed class": altered(TensorProperties, "dtype", body("x")),
        "constructor of an allowed class": altered(MetadataIndex, "__init__", name_of(SavePlan)),
        "attribute of torch.Size": altered(torch.Size, "numel", body(1)),
        "allowed function as a class": start
        + b"ctorch.serialization\n_get_layout\n"
        + body(("torch.strided",))
        + pickle.NEWOBJ
        + pickle.STOP,
        "dotted name": pickle.PROTO + b"\x04" + b"\x8c\x05torch\x8c\x10serialization.io\x93" + pickle.STOP,
        "extension": start + pickle.EXT1 + b"\x01" + pickle.STOP,
        "persistent": start + body("x") + pickle.BINPERSID + pickle.STOP,
        "memory": start + pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\xff" + pickle.STOP,
        "pickled object": pickle.dumps(hidden),
        "file elsewhere": pickle.dumps(elsewhere),
        "transformed": pickle.dumps(transformed),
        "a list": pickle.dumps([1, 2]),
        "deep": start + pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999 + pickle.STOP,
        "empty": b"",
    }


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A stream with some bytes changed, dropped, doubled, moved, or taken for opcodes."""
    data = bytearray(content)
    codes = [ord(code.code) for code in pickletools.opcodes]
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, kind = draw.randrange(len(data)), draw.randrange(6)
        if kind == 0:
            data[at] = draw.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[at] = draw.choice(codes)
        elif kind == 3:
            data.insert(at, draw.choice(codes))
        elif kind == 4:
            del data[at : at + draw.randrange(1, 9)]
        else:
            other = draw.randrange(len(data))
            data[at:at] = data[other : other + draw.randrange(1, 60)]
        if not data:
            return b"."
    return bytes(data)


def real(found: Metadata) -> bool:
    """Whether what was taken is made of torch's own objects and plain numbers, within the file."""
    tensors = found.state_dict_metadata.values()
    places = found.storage_data.items()
    return (
        type(found) is Metadata
        and all(type(one) is TensorStorageMetadata for one in tensors)
        and all(type(one.properties.dtype) is torch.dtype for one in tensors)
        and all(type(key) is MetadataIndex and type(key.fqn) is str for key, _ in places)
        and all(place.relative_path == FILE and 0 <= place.offset <= BYTES for _, place in places)
    )


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    canary = folder / "canary"
    (folder / FILE).write_bytes(bytes(BYTES))
    evil = attacks(str(canary))
    honest = [pickle.dumps(index(), protocol) for protocol in (2, 3, 4, 5)]
    draw = random.Random(11)
    seeds = [*honest, *(content for content in evil.values() if 0 < len(content) < 10_000)]
    streams = [("honest", honest[0]), *evil.items()]
    streams += [("mutated", mutated(draw.choice(seeds), draw)) for _ in range(count)]
    outcome: dict[str, Any] = {"taken": [], "refused": 0, "odd": [], "ran": [], "altered": []}
    shapes = {cls: dict(vars(cls)) for cls in (Metadata, MetadataIndex, TensorProperties, SavePlan)}
    watching = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1] not in ("r", "rb")
        if watching and event not in _QUIET and (writes or event.startswith(_RUNS)):
            outcome["ran"].append(f"{event} {arguments!r}"[:200])

    read_index_once(folder, honest[0])  # whatever is imported late is by then
    sys.addaudithook(hook)
    for name, content in streams:
        (folder / NAME).write_bytes(content)
        watching = True
        try:
            found = read_index(folder)
            outcome["taken"].append(name)
            if not real(found):
                outcome["odd"].append(name)
        except SpellError:
            outcome["refused"] += 1
        except Exception as error:
            outcome["odd"].append(f"{name}: {error!r}")
        finally:
            watching = False
    outcome["altered"] = [cls.__name__ for cls, before in shapes.items() if dict(vars(cls)) != before]
    outcome["canary"] = canary.exists()
    sys.stdout.write(json.dumps(outcome) + "\n")


def read_index_once(folder: Path, content: bytes) -> None:
    (folder / NAME).write_bytes(content)
    read_index(folder)
    (folder / NAME).write_bytes(b"")
    with suppress(SpellError):
        read_index(folder)


if __name__ == "__main__":
    main()
