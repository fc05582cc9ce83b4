"""Digests, writes that a power cut does not undo, and reads that nothing can hold up or blow up.

A file that cannot be read is not a file that is missing or damaged: what a file server refuses for a while
(EIO, ESTALE, EACCES) is tried again, and then raised as it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

TENSORS = ".distcp"
"""Ending of the files that hold a checkpoint's tensors; all others are small."""
PATIENCE_SECONDS = 120.0
"""So long a file that cannot be read is tried again."""
_LARGEST_JSON = 1 << 30
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What says that a file is not there, or is none."""
Result = TypeVar("Result")
Digester = Callable[[Path, Iterable[str]], dict[str, str]]
"""Something that does what `digests` does."""


def absent(error: OSError) -> bool:
    """Whether an error tells of the folder's content, and not of the way to it."""
    return error.errno in _ABSENT


def patiently(read: Callable[[], Result]) -> Result:
    """The result of `read`, which is called again for a while where the file system does not let it."""
    attempts = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, OSError) and not absent(error)),
        wait=wait_exponential(0.5, max=10),
        stop=stop_after_delay(PATIENCE_SECONDS),
        reraise=True,
    )
    return attempts(read)


def new_digest() -> hashlib.blake2b:
    """The digest of a file's content, to be told it piece by piece."""
    return hashlib.blake2b(digest_size=16)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digest of each file of `folder` by its relative name; of one that is not there, or is no file, none.

    Raises OSError where a file cannot be read.
    """
    files = sorted(names)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: _digest(folder / name), files)
    return {name: digest for name, digest in zip(files, found, strict=True) if digest}


def names_below(folder: Path) -> set[str]:
    """Relative names of all files of a folder. Raises OSError where a folder cannot be read."""
    found: set[str] = set()
    for place, _, files in os.walk(folder, onerror=_raise):
        found.update((Path(place) / name).relative_to(folder).as_posix() for name in files)
    return found


def stamps(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file: where they are the same, its digest is."""
    found = {name: (folder / name).stat() for name in names}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def inside(name: object) -> bool:
    """Whether a relative name stays in its folder."""
    return (
        isinstance(name, str)
        and bool(name)
        and not PurePosixPath(name).is_absolute()
        and ".." not in (PurePosixPath(name).parts)
    )


def open_plain(path: Path) -> BufferedReader:
    """A file for reading. Raises ValueError where it is a pipe or a device, which would hold the reader up."""
    file: BufferedReader = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is no plain file")
    return file


def read_bytes(path: Path, largest: int) -> bytes:
    """The bytes of a plain file. Raises ValueError where it is none, or larger."""
    with open_plain(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest >> 20} MiB")
    return content


def read_json(path: Path) -> Any:
    """Raises ValueError where the file holds anything else."""
    try:
        return json.loads(read_bytes(path, _LARGEST_JSON))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    try:
        with open_plain(path) as file:
            return hashlib.file_digest(file, new_digest).hexdigest()
    except ValueError:
        return ""
    except OSError as error:
        if absent(error):
            return ""
        raise


def _raise(error: OSError) -> None:
    raise error
