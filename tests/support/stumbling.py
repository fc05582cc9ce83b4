"""A file system that stumbles: a shim under `open` and the functions of `os`."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CALLS = (
    "open",
    "mkdir",
    "rename",
    "replace",
    "fsync",
    "listdir",
    "scandir",
    "stat",
    "lstat",
    "unlink",
    "rmdir",
)


class Stumbling:
    """Counts the calls that name a path below `root`, and lets those fail that `fails` names."""

    def __init__(self, root: Path, fails: Callable[[int], bool], code: int) -> None:
        self._root, self._fails, self._code, self.calls = str(root), fails, code, 0

    def through(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # A handle counts, too: fsync's.
            if arguments and (isinstance(arguments[0], int) or str(arguments[0]).startswith(self._root)):
                self.calls += 1
                if self._fails(self.calls):
                    raise OSError(self._code, os.strerror(self._code), str(arguments[0]))
            return function(*arguments, **options)

        return call


@contextmanager
def stumbling(root: Path, fails: Callable[[int], bool], code: int = errno.EIO) -> Iterator[Stumbling]:
    shim = Stumbling(root, fails, code)
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, shim.through(getattr(os, name)))
        for module in ("builtins", "io"):
            patch.setattr(f"{module}.open", shim.through(open))
        yield shim
