"""Whose a folder is, and who else gets there: what is loaded and executed from a disk must be this user's alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    """Whether a folder is there, is no link, and this user alone can have put something into it."""
    with suppress(OSError):
        status = folder.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return False


def make_own(folder: Path) -> None:
    """Make a folder for what is executed later. Raises SpellError where one stands there that others can write to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SpellError(f"cannot make the folder {folder}: {error.strerror}; choose another place") from None
    if not own(folder):
        raise SpellError(
            f"{folder} is a link, another user's, or others can write to it, and what stands there would be executed:"
            " remove it, or choose another place"
        )
