"""What is in the device's memory in each phase of a step, where trainer and engine share the device.

On the same GPUs (`rollout.placement: colocated`) the two do not fit side by side, and the order in which one
leaves and the other comes decides whether a step runs out of memory. The order is no matter of care here: a
phase names what it holds, and a change of phase offloads what the new one does not name, waits until every rank
has done so, and only then loads what it does. At no moment is there more than the larger of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

Part = Literal["parameters", "optimizer", "engine weights", "engine cache"]


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """What a phase has in memory, and what may be lost when it begins: nobody reads that before it is overwritten."""

    holds: frozenset[Part] = frozenset()
    loses: frozenset[Part] = frozenset()


class Phase(Enum):
    """A part of the step, with what is in memory. `optimizer` stands for gradients, too."""

    BUILD = PhaseMemory()
    """The engine is made: it measures what is free, and takes a share of it."""
    GENERATE = PhaseMemory(frozenset({"engine weights", "engine cache"}))
    UPDATE = PhaseMemory(frozenset({"parameters", "optimizer"}), loses=frozenset({"engine weights"}))
    """A resync follows, which brings the engine new weights."""
    RESYNC = PhaseMemory(frozenset({"parameters", "engine weights"}), loses=frozenset({"engine weights"}))
    SAVE = PhaseMemory(frozenset({"parameters", "optimizer"}))


class Offloadable(Protocol):
    """Something whose parts can leave the device's memory and come back."""

    @property
    def parts(self) -> frozenset[Part]: ...

    def offload(self, parts: frozenset[Part], lost: frozenset[Part]) -> None:
        """Let `parts` leave; the content of those in `lost` need not be kept."""
        ...

    def onload(self, parts: frozenset[Part]) -> None: ...


class Placement:
    """Offloads and loads parts, phase by phase. `barrier` returns when every rank has called it.

    Where nothing was admitted (`disaggregated`) nothing ever moves. Every rank has to enter the same phases in the same
    order: one that does not is waited for at the barrier.
    """

    def __init__(self, barrier: Callable[[], None] = lambda: None) -> None:
        self._barrier = barrier
        self._owners: list[Offloadable] = []
        self._present: frozenset[Part] = frozenset()
        self._phase: Phase | None = None

    def admit(self, owner: Offloadable) -> None:
        """Look after one more, which is in memory with all its parts."""
        self._owners.append(owner)
        self._present |= owner.parts

    def enter(self, phase: Phase) -> None:
        if not self._owners or phase is self._phase:
            return
        leaving, coming = self._present - phase.value.holds, phase.value.holds - self._present
        for owner in self._owners:
            if own := leaving & owner.parts:
                owner.offload(own, phase.value.loses)
        self._barrier()
        for owner in self._owners:
            if own := coming & owner.parts:
                owner.onload(own)
        self._present, self._phase = phase.value.holds, phase
