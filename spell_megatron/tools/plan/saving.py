"""What checkpoints cost, and what lies in a node's host memory.

Every rank saves and loads its own share of weights and optimizer state (`policy/checkpoint/parts.py`). In the
background it writes a copy of that in host memory; training waits for the copy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spell_megatron.config import Config, PolicyConfig
from spell_megatron.policy.layout import WorldShape
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.engine import EngineMemory
from spell_megatron.tools.plan.parameters import StageParameters, Static, share, state_width, width


@dataclass(frozen=True, slots=True)
class Saving:
    """Bytes of the busiest GPU's rank, but for the whole and the node; and seconds."""

    staged: int
    """Written in a save, and in the background in host memory for it."""
    read: int
    """From files, in a resume; the weights' rest comes from the other ranks."""
    whole: int
    """Bytes of a checkpoint."""
    blocked: float
    """Training waits in a save."""
    written: float
    """A save, all told."""
    loaded: float
    """A resume: every rank digests its share of the files, and reads what it needs."""
    host: int
    """The most that a node's processes keep in host memory: this, offloaded activations, an offloaded optimizer, and
    what leaves the GPU while somebody else needs its memory."""


def saved_bytes(part: StageParameters, policy: PolicyConfig, world: WorldShape) -> int:
    """What one rank of a pipeline stage writes."""
    return share(part, policy, world) * (width(policy) + state_width(policy))


def read_bytes(part: StageParameters, policy: PolicyConfig, world: WorldShape) -> int:
    """What one rank of a pipeline stage reads: without a distributed optimizer all that it holds."""
    if policy.optimizer.distributed:
        return saved_bytes(part, policy, world)
    return part.total * (width(policy) + state_width(policy))


def saving(
    config: Config,
    world: WorldShape,
    parts: Sequence[StageParameters],
    static: Sequence[Static],
    offloaded: int,
    engine: EngineMemory,
    assumed: Assumptions,
) -> Saving:
    """`parts` and `static` are of the pipeline's stages, `world` of the trainer; `offloaded` are bytes of a rank's
    activations."""
    policy, per_node = config.policy, world.size // config.cluster.nodes
    staged = max(saved_bytes(part, policy, world) for part in parts)
    read = max(read_bytes(part, policy, world) for part in parts)
    ranks = world.size // policy.layout.pipeline
    whole = ranks * sum(saved_bytes(part, policy, world) for part in parts)
    written = assumed.save_seconds + staged * per_node / assumed.file_rate
    kept = staged if config.record.async_save else 0
    kept += max(one.host for one in static) + offloaded
    if engine.colocated:
        # vLLM takes pinned memory of torch's for its copy; the learner's is as large as what it copies.
        kept += round(engine.weights * assumed.pinned_rounding)
        kept += max(one.weights + one.optimizer + one.reference for one in static)
    return Saving(
        staged=staged,
        read=read,
        whole=whole,
        blocked=assumed.save_seconds + staged / assumed.host_rate if config.record.async_save else written,
        written=written,
        loaded=(staged + read) * per_node / assumed.file_rate,
        host=kept * per_node,
    )
