"""An engine's device memory, given back while the trainer needs it: that of this process' engine, and of servers that
somebody else starts on the trainer's nodes."""

from __future__ import annotations

from pathlib import Path

from spell_megatron.base.placement import Part
from spell_megatron.rollout.engine import Engine, Memory

_MEMORY: dict[Part, Memory] = {"engine weights": "weights", "engine cache": "cache"}


class EngineOffload:
    """A `placement.Offloadable`. vLLM lets go of everything at once and takes it back in parts."""

    parts: frozenset[Part] = frozenset(_MEMORY)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._awake = self.parts

    def offload(self, parts: frozenset[Part], lost: frozenset[Part]) -> None:
        self._engine.sleep(keep="engine weights" not in lost)
        staying, self._awake = self._awake - parts, frozenset()
        if staying:
            self.onload(staying)

    def onload(self, parts: frozenset[Part]) -> None:
        for part in sorted(parts, reverse=True):
            self._engine.wake(_MEMORY[part])
        self._awake |= parts


class Vacancy:
    """A `placement.Offloadable`: a file that is there while the trainer is not in the memory. Who keeps up servers on
    other nodes looks for it before one starts."""

    parts: frozenset[Part] = frozenset({"engine cache"})

    def __init__(self, file: Path) -> None:
        self._file = file
        self.onload(self.parts)

    def offload(self, parts: frozenset[Part], lost: frozenset[Part]) -> None:
        self._file.unlink(missing_ok=True)

    def onload(self, parts: frozenset[Part]) -> None:
        self._file.touch()
