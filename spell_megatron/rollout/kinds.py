"""The engines that a run may have: vLLM's, and the user's own by its import path in `rollout.kind`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spell_megatron.base.registry import Registry
from spell_megatron.base.topology import Topology
from spell_megatron.config import RolloutConfig
from spell_megatron.rollout.engine import Engine
from spell_megatron.rollout.fleet import Fleet
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.rollout.keeping import Keeping


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """What a run wants of the engine that rank 0 asks."""

    model: Path
    """A Hugging Face folder, with the weights of version 0."""
    settings: RolloutConfig
    seed: int
    stop: tuple[int, ...]
    """Tokens that end a completion; they are its last one."""
    scratch: Path
    """For what it leaves on the disk."""
    logs: Path
    found: Topology
    """Where it is to compute, and whether it takes turns with the trainer there (`colocated`)."""
    tells_experts: bool = False
    """Whether rollouts are to say which experts their tokens went to."""
    keeping: Callable[[str], Keeping] | None = None
    """Who keeps the server at a URL of the settings, where the launcher does."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """How engines of one kind are made. Raises SpellError where the order cannot be met."""

    name: str
    make: Callable[[EngineOrder], Engine]


def _vllm(order: EngineOrder) -> Engine:
    """In this process where the topology has no servers, else a fleet of them."""
    settings, found = order.settings, order.found
    if not found.engines and not settings.servers.urls:
        return InProcessEngine(
            order.model,
            settings,
            seed=order.seed,
            stop=order.stop,
            scratch=order.scratch,
            sleeps=found.colocated,
            tells_experts=order.tells_experts,
        )
    return Fleet(
        order.model,
        settings,
        stop=order.stop,
        scratch=order.scratch,
        logs=order.logs,
        # Of servers that somebody else started nobody knows which weights they hold, until they are given some.
        version=-1 if settings.servers.urls else 0,
        found=found,
        tells_experts=order.tells_experts,
        keeping=order.keeping,
    )


ENGINES: Registry[EngineKind] = Registry("engine", EngineKind, (EngineKind("vllm", _vllm),))
