"""Whose a folder is, and who else gets there: what is loaded and executed from a disk must be this user's alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from spell_megatron.types import SpellError


@contextmanager
def private(group_readable: bool) -> Iterator[None]:
    """What this process and its children make until the block ends is closed to others."""
    before = os.umask(0o027 if group_readable else 0o077)
    try:
        yield
    finally:
        os.umask(before)


def own(folder: Path) -> bool:
    """Whether a folder is there, is no link, this user alone can have put something into it, and nobody but this user
    and root can put another one into its place."""
    with suppress(OSError):
        above = {*folder.absolute().parents, *folder.resolve().parents}
        return _closed(folder) and all(_keeps(place.stat()) for place in above)
    return False


def _closed(folder: Path) -> bool:
    """Whether this user alone can have put something into a folder."""
    with suppress(OSError):
        status = folder.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return False


def _keeps(place: os.stat_result) -> bool:
    """Whether what lies in a folder stays there, whatever others do. A group that may write may have this user alone in
    it, which cannot be told."""
    writable = place.st_mode & 0o022 and not place.st_mode & stat.S_ISVTX
    return place.st_uid in _trusted() and not writable


@cache
def _trusted() -> set[int]:
    """This user and root, who in a container with users of its own has the number of all whom that does not know."""
    found = {0, os.getuid()}
    with suppress(OSError):
        if Path("/proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]:
            found.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return found


def make_own(folder: Path) -> None:
    """Make a folder for what is executed later. Raises SpellError where one stands there that others can write to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SpellError(f"cannot make the folder {folder}: {error.strerror}; choose another place") from None
    if not _closed(folder):
        raise SpellError(
            f"{folder} is a link, another user's, or others can write to it, and what stands there would be executed:"
            " remove it, or choose another place"
        )
