"""Small files, as every room reads and writes them: a model folder's JSON object; a text that is there whole or not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spell_megatron.types import SpellError

_HALVES = re.compile("[\ud800-\udfff]")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises FileNotFoundError, or SpellError for what cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise SpellError(f"cannot read {path}: {error}; copy the model folder again") from None
    if not isinstance(value, dict):
        raise SpellError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def has_halves(text: str) -> bool:
    """Whether a text has half characters, which JSON can spell and no tokenizer takes."""
    return _HALVES.search(text) is not None


def hf_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder. Raises SpellError where there is none, or it cannot be read."""
    try:
        return read_object(folder / "config.json")
    except FileNotFoundError:
        raise SpellError(
            f"{folder} is not a model folder: it has no config.json; give the folder of a Hugging Face model"
        ) from None


def weights_dtype(config: Mapping[str, Any]) -> str | None:
    """In which precision a config.json says that the weights are; older ones say it under another key."""
    return config.get("dtype") or config.get("torch_dtype")


def home_of_links(folder: Path) -> Path:
    """What the links of a folder may not leave: itself, or the cache of its hub repository, where a snapshot's files
    are links to blobs."""
    folder = folder.resolve()
    for above in folder.parents:
        if above.name == "snapshots" and (above.parent / "blobs").is_dir():
            return above.parent
    return folder


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; what stood there stands until the new text is on the disk. Raises OSError."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
