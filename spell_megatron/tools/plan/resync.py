"""Seconds of a resync, from the bytes that it moves and the copies that it makes.

To engines on the trainer's GPUs (`rollout/transfer/local.py`) every GPU hands over the whole model by itself: it
gathers what it lacks, joins the parts, stages them, and its engine worker copies them out of there, keeps its share and
puts that in place. To engines elsewhere (`rollout/transfer/store.py`) rank 0 copies the gathered model to host memory
while a communicator's thread takes it from there, packs it and broadcasts it.
"""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.config import Config
from spell_megatron.rollout.transfer.manifest import STAGED_BYTES
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.engine import EngineMemory
from spell_megatron.tools.plan.parameters import total_parameters, width
from spell_megatron.weights.shape import ModelShape

_COPY = 2
"""Bytes of memory traffic for a byte that is copied: read and written."""


@dataclass(frozen=True, slots=True)
class Resync:
    """What the busiest GPU does in one resync. Bytes, but for the last two."""

    gathered: float
    """Received from other ranks of the trainer."""
    distant: bool
    """Some of these are on other nodes."""
    copied: float
    """Read and written in the GPU's memory, at both ends."""
    hosted: float
    """To host memory; as many come back at the same time."""
    broadcast: float
    """Sent to engines on other nodes."""
    tensors: int
    buckets: int

    def seconds(self, assumed: Assumptions) -> float:
        link = (assumed.network_rate if self.distant else assumed.node_rate) * assumed.link_efficiency
        network, memory = (
            rate * assumed.link_efficiency for rate in (assumed.network_rate, assumed.memory_rate)
        )
        return (
            self.gathered / link
            + self.copied / memory
            + self.hosted / assumed.host_rate
            + self.broadcast / network
            + self.tensors * assumed.tensor_seconds
            + self.buckets * assumed.bucket_seconds
        )


def resync(config: Config, shape: ModelShape, engine: EngineMemory) -> Resync:
    """Bytes that one GPU moves in a resync, and in how many tensors and buckets."""
    layout, cluster = config.policy.layout, config.cluster
    whole = total_parameters(shape) * width(config.policy)
    inside = max(layout.tensor, layout.expert * layout.expert_tensor)
    stages_apart = layout.pipeline > 1 and cluster.gpus > cluster.gpus_per_node
    spread = layout.pipeline * inside
    joined = _COPY * whole if layout.tensor > 1 or layout.expert_tensor > 1 else 0
    staged = _COPY * whole  # packed, where there is a communicator
    loaded = 2 * _COPY * whole / engine.tensor  # into a layer that is complete, and from there into its place
    away = not engine.colocated
    return Resync(
        gathered=whole * (spread - 1) / spread,
        distant=stages_apart or inside > cluster.gpus_per_node,
        copied=joined + staged + loaded + (0 if away else _COPY * whole),
        hosted=whole if away else 0,
        broadcast=whole if away else 0,
        tensors=tensor_count(shape),
        buckets=-(-whole // STAGED_BYTES),
    )


def tensor_count(shape: ModelShape) -> int:
    """Tensors of the Hugging Face model: engines are given them one by one."""
    return sum(len(row.names) * shape.copies(row) for row in shape.rows())
