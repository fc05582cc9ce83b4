"""Programs of Debian that tests need: they are installed where that can be done."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence

_APT = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}


def install(packages: Sequence[str], missing: Callable[[], list[str]]) -> str:
    """As root, install packages where `missing` names programs. What is missing after all, with the remedy."""
    if missing() and os.geteuid() == 0 and shutil.which("apt-get"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            for task in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
                command = ["apt-get", *task]
                subprocess.run(command, env=_APT, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    left = missing()
    return f"no {', '.join(left)}: apt-get install {' '.join(packages)}" if left else ""
