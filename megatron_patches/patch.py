"""What a patch must say of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_patches.versions import TESTED


@dataclass(frozen=True, slots=True)
class Patch:
    """A correction of megatron-core that is applied at start-up, if it is still needed.

    `scope` is "cpu" for what only a machine without CUDA lacks, "any" for what is wrong everywhere.
    `needed()` looks at the installed megatron-core, whatever its version. `versions` are the tested ones that
    need the patch, and what `upstream` refers to is in the first of them; where none is left, the file can go.
    """

    name: str
    scope: Literal["cpu", "any"]
    upstream: str
    breaks: str
    needed: Callable[[], bool]
    apply: Callable[[], None]
    versions: tuple[str, ...] = TESTED
    layers: Literal["any", "torch", "te"] = "any"
    """Whether only layers of plain torch need it, where Transformer Engine is missing, or only Transformer Engine's."""
