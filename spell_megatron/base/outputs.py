"""Folders that a command writes on request: whole or not at all, and in place of nobody else's files.

A folder is written beside its place and renamed into it when every byte is on the disk. A marker in it lists what was
written: a folder that holds those files and no others is an earlier output, and may be replaced by the same command.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from spell_megatron.base.files import sync
from spell_megatron.types import SpellError

Kind = Literal["model", "import"]
MARKER = ".spell-megatron.json"
_LARGEST = 1 << 24


def check_output(out: Path, kind: Kind) -> None:
    """Raise SpellError where `out` is neither new, nor empty, nor an earlier output of this kind and no more."""
    try:
        foreign = _foreign(out, kind)
    except OSError as error:
        raise SpellError(
            f"cannot look into {out}: {error.strerror or error}; choose another folder"
        ) from None
    if foreign:
        raise SpellError(
            f"{out} is not empty, and {foreign} was not written by this command: nothing was changed."
            " Choose a new folder, or empty this one yourself"
        )


def make_room(out: Path, kind: Kind) -> None:
    """Rename what stands at `out` where it may not be replaced. Raises OSError."""
    if not _foreign(out, kind):
        return
    number = 1
    while os.path.lexists(kept := out.with_name(f"{out.name}.kept-{number}")):
        number += 1
    out.rename(kept)


@contextmanager
def new_folder(out: Path, kind: Kind) -> Iterator[Path]:
    """A folder to write into, which stands at `out` when the block has ended well, and nowhere otherwise.

    Raises SpellError as `check_output`, OSError where it cannot be written.
    """
    check_output(out, kind)
    staged = stage(out)
    try:
        yield staged
        publish(staged, out, kind)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def stage(out: Path) -> Path:
    """A new folder beside `out`, on the same disk."""
    out = _place(out)
    staged = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    staged.mkdir(parents=True)
    return staged


def publish(staged: Path, out: Path, kind: Kind) -> None:
    """Give a staged folder its name. Raises SpellError as `check_output`; the folder at `out` is then as it was."""
    made = {"made_by": "spell-megatron", "kind": kind, "files": sorted(_files(staged) - {MARKER})}
    (staged / MARKER).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    _sync_below(staged)
    check_output(out, kind)
    out = _place(out)
    before = _listed(out)
    if not before:
        staged.rename(out)  # also over an empty folder
        sync(out.parent)
        return
    old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    out.rename(old)
    try:
        staged.rename(out)
    except OSError:
        old.rename(out)
        raise
    sync(out.parent)
    _remove(old, before)


def _foreign(out: Path, kind: Kind) -> str:
    """A file at `out` that may not be replaced; empty where there is none."""
    if not out.is_dir():
        return str(out) if out.exists() else ""
    found = _files(out)
    if not found:
        return ""
    ours = _listed(out, kind)
    return min(found - ours, default="")


def _listed(out: Path, kind: Kind | None = None) -> set[str]:
    """What the marker of a folder says was written, and the marker."""
    try:
        with (out / MARKER).open("rb") as file:
            made = json.loads(file.read(_LARGEST))
        if made["made_by"] == "spell-megatron" and kind in (None, made["kind"]):
            return {MARKER, *map(str, made["files"])}
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return set()


def _files(folder: Path) -> set[str]:
    """Everything below a folder but plain folders; of these, the empty ones."""
    found: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_raise):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        found.update((here / name).relative_to(folder).as_posix() for name in (*files, *links))
        if not folders and not files and here != folder:
            found.add(here.relative_to(folder).as_posix())
    return found


def _sync_below(folder: Path) -> None:
    """Make a folder of plain files and folders survive a power cut."""
    for place, _, files in os.walk(folder, topdown=False, onerror=_raise):
        for name in files:
            sync(Path(place) / name)
        sync(Path(place))


def _remove(folder: Path, names: set[str]) -> None:
    """Remove these files and the folders that are empty then, and nothing else."""
    for name in names & _files(folder):
        with suppress(OSError):
            (folder / name).unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(place)


def _place(out: Path) -> Path:
    """Where a link leads, so that the link stays."""
    return Path(os.path.realpath(out.expanduser()))


def _raise(error: OSError) -> None:
    raise error
