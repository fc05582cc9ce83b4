"""Folders for the sockets of a server: with a short path, for this user alone, and gone when nobody uses them.

Each holds a file that is locked for as long as its server's guard lives. The kernel lets go of a lock whose holder was
killed, so the next server that starts removes what killed ones left; it touches nothing of another user's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "spell-"
_LOCK = ".spell-megatron-server"
_LONGEST = 55
"""Characters of a path that leave room, in the 107 of a socket's, for our folder's name and for vLLM's in it."""


@contextmanager
def make() -> Iterator[tuple[Path, int]]:
    """A new folder, and the descriptor of its lock, which whoever uses the folder has to inherit in the block."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_root()))  # mode 0700
    begun = folder / f"{_LOCK}.begun"
    descriptor = os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        begun.rename(folder / _LOCK)  # never seen unlocked while it is used
        yield folder, descriptor
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def sweep() -> None:
    """Remove this user's folders that nobody uses any more."""
    for folder in _root().glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is in use
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _root() -> Path:
    """The temporary folder, unless its path is too long for a socket's; then the system's own."""
    here = tempfile.gettempdir()
    return Path(here if len(os.fsencode(here)) <= _LONGEST else "/tmp")
