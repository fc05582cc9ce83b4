"""What tests have done within limits, in a process that imports nothing else."""

from __future__ import annotations

import os
import time


def take(seconds: float, size: int) -> int:
    """Take the processor's time and memory; returns the bytes."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return len(bytearray(size))


def rest(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def die() -> None:
    os._exit(1)


def fail(message: str) -> None:
    raise ValueError(message)
