"""What tests have done within limits, in a process that imports nothing else."""

from __future__ import annotations

import os
import time


def take(seconds: float, size: int) -> int:
    """Take time and memory; returns the bytes."""
    time.sleep(seconds)
    return len(bytearray(size))


def die() -> None:
    os._exit(1)


def fail(message: str) -> None:
    raise ValueError(message)
