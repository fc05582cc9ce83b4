"""What a fault in reading or writing a checkpoint comes down to, in one line."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

_SCRAPS = 1 << 20


def reason(error: BaseException, folder: Path | None = None) -> str:
    """Why something below `folder` failed. torch tells of a full disk as of an odd position."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    odd = isinstance(error, RuntimeError) and folder is not None and _free(folder) < _SCRAPS
    return "the disk is full" if full or odd else str(error) or type(error).__name__


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return _SCRAPS
