"""What a patch must say of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Patch:
    """A correction of megatron-core that is applied at start-up, if it is still needed.

    `scope` is "cpu" for what only a machine without CUDA lacks, "any" for what is wrong everywhere.
    `needed()` looks at the installed megatron-core; where it answers no, the file can be deleted.
    """

    name: str
    scope: Literal["cpu", "any"]
    upstream: str
    breaks: str
    needed: Callable[[], bool]
    apply: Callable[[], None]
