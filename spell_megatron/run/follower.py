"""What a rank other than 0 has where rank 0 has its driver: a place in every resync, and nobody to tell."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from spell_megatron.base.topology import Transfer
from spell_megatron.rollout.follower import FollowerEngine


class Follower:
    """The driver's methods that every rank calls. All are silent."""

    def __init__(self, model: Path, way: Transfer, scratch: Path) -> None:
        self.engine = FollowerEngine(model, way, scratch=scratch)

    def begin(self, step: int) -> None: ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def say(self, doing: str) -> None: ...

    def note(self, text: str) -> None: ...

    def record_scores(self, step: int, scores: Mapping[str, float]) -> None: ...

    def set_aside(self, step: int) -> None: ...

    def report(self) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        self.engine.close()
