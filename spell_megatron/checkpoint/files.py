"""Digests, and writes that a power cut does not undo."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digest of each file of `folder` by its relative name; of one that cannot be read none."""
    files = sorted(names)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: _digest(folder / name), files)
    return {name: digest for name, digest in zip(files, found, strict=True) if digest}


def names_below(folder: Path) -> set[str]:
    """Relative names of all files of a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""
