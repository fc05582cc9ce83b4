"""Which files a source stands for: those below a folder, one by its path, those of a hub data set."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from spell_megatron.base.files import home_of_links
from spell_megatron.base.terminal import said
from spell_megatron.corpus.reading.text import Skipped
from spell_megatron.types import SpellError

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")
_HUB_ROWS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
_TOOLS = {"__pycache__", "node_modules", "CVS", "dataset_info.json", "dataset_dict.json", "state.json"}
"""Folders and files that tools keep among a person's own; the last ones are about a data set saved to disk."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file, and the name that its texts go by. One that the user named is read whatever its ending."""

    path: Path
    name: str
    asked: bool = False


def places(path: str, skipped: Skipped) -> Iterator[Place]:
    """The files of a source in a fixed order. Raises SpellError where there is no such source."""
    place = Path(path).expanduser()
    if place.is_dir():
        yield from _below(place, skipped)
    elif place.exists():
        yield Place(place, place.name, asked=True)
    else:
        yield from _of_hub(path)


def _below(root: Path, skipped: Skipped) -> Iterator[Place]:
    home = home_of_links(root)

    def unreadable(error: OSError) -> None:
        skipped.add("unreadable", _name(root, error.filename, ""), error.strerror or str(error))

    for parent, folders, files in os.walk(root, onerror=unreadable):
        for name in sorted(folders):
            if reason := _unwanted(name) or ("links to folders" if Path(parent, name).is_symlink() else ""):
                folders.remove(name)
                skipped.add(reason, _name(root, parent, name), level=logging.INFO)
        folders.sort()
        for name in sorted(files):
            path, shown = Path(parent, name), _name(root, parent, name)
            if reason := _unwanted(name):
                skipped.add(reason, shown, level=logging.INFO)
            elif path.is_symlink() and not (to := Path(os.path.realpath(path))).is_relative_to(home):
                skipped.add("links that leave the folder", shown, f"to {to}")
            else:
                yield Place(path, shown)


def _unwanted(name: str) -> str:
    """Why a name is no document's; empty where it may be one."""
    if name.startswith("."):
        return "hidden"
    return "kept by a tool" if name in _TOOLS else ""


def _name(root: Path, parent: str, name: str) -> str:
    return Path(parent, name).relative_to(root).as_posix()


def _of_hub(path: str) -> Iterator[Place]:
    """Files of the hub data set `org/name` or `org/name:pattern`, each fetched when it is reached."""
    match = _HUB.fullmatch(path)
    if match is None:
        raise SpellError(
            f"the corpus {path!r} is neither a file, a folder nor a hub id (org/name or org/name:pattern)"
        )
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise SpellError(
            f"there is no file or folder {path!r}; to read it from the hub: pip install huggingface_hub"
        ) from None
    repository, pattern = match[1], match[2] or "*"
    try:
        names = sorted(HfApi().list_repo_files(repository, repo_type="dataset"))
    except (
        Exception
    ) as error:  # the hub client raises several unrelated families of errors when it is offline
        raise SpellError(
            f"there is no file or folder {path!r}, and the hub data set {repository} cannot be listed:"
            f" {said(error).rstrip('.')}; download it and give its folder"
        ) from None
    chosen = [
        name
        for name in names
        if fnmatch(name, pattern) and any(suffix.lower() in _HUB_ROWS for suffix in Path(name).suffixes[-2:])
    ]
    if not chosen:
        raise SpellError(
            f"the hub data set {repository} has no file of rows (JSON lines, Parquet, CSV …) that matches {pattern!r}"
        )
    for name in chosen:
        try:
            yield Place(Path(hf_hub_download(repository, name, repo_type="dataset")), name)
        except (OSError, HfHubHTTPError) as error:
            raise SpellError(
                f"cannot fetch {name} of the hub data set {repository}: {said(error).rstrip('.')}"
            ) from None
