"""Bytes that one GPU sends in a step, by kind, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.config import Config, PolicyConfig
from spell_megatron.policy.layout import WorldShape, dispatcher
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.parameters import StageParameters, total_parameters, width
from spell_megatron.tools.plan.workload import passes, scorings
from spell_megatron.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes sent by a GPU of the busiest pipeline stage in one step."""

    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    resync: float

    @property
    def total(self) -> float:
        return self.tensor + self.context + self.expert + self.pipeline + self.data + self.resync


def step_traffic(
    shape: ModelShape,
    policy: PolicyConfig,
    world: WorldShape,
    parts: list[StageParameters],
    tokens: float,
    rows: float,
    gpus_per_node: int,
) -> Traffic:
    """`tokens` pass one data-parallel rank in the step and `rows` of them are predicted, context ranks together."""
    layout, b = policy.layout, width(policy)
    tp, cp, pp = layout.tensor, layout.context, layout.pipeline
    count, scored = passes(policy, shape), scorings(policy)
    forward, gathers = count.layers + scored, count.attention + scored  # gathers of keys and values
    # Tokens go to experts and come back in every pass. The second forward one does not send back what other
    # expert-parallel ranks computed (`policy/experts.py`).
    copies = _sent(shape, policy, gpus_per_node) * (2 * forward + 2)
    if _by_nccl(policy, gpus_per_node) and policy.fp8 == "off":
        copies -= _share(layout.expert) * (count.layers - 1)
    local, layers = tokens / cp, shape.layers / pp
    residual = local * shape.hidden * b
    kv = max(shape.kv_heads / tp, 1) * shape.head_dim * 2
    blocks = 1 if shape.experts else 2  # of a layer that are tensor parallel
    # Sequence parallel: gather and scatter, forward and backward, and a gather for the weights' gradients.
    # Without it: an all-reduce (twice the bytes) forward and one backward.
    per_block = 2 * forward + 3 if layout.sequence else 2 * forward + 2
    routed = local * shape.experts_per_token * shape.hidden * b / (tp if layout.sequence else 1)
    dense, expert = max(part.dense for part in parts), max(part.expert for part in parts)
    bytes_of_weight = (4 + b if policy.optimizer.distributed else 8) * policy.minibatches
    return Traffic(
        tensor=_share(tp) * (layers * blocks * per_block * residual + rows / cp * shape.hidden * b * 2),
        context=(cp - 1) * layers * local * kv * ((gathers + 1) * b + 4),
        expert=layers * routed * copies,
        pipeline=0.0
        if pp == 1
        else (2 + scored) * residual * (layout.virtual_pipeline or 1) / (tp if layout.sequence else 1),
        data=bytes_of_weight * (_share(world.data * cp) * dense + _share(world.expert_data) * expert),
        resync=0.0 if world.size == 1 else total_parameters(shape) * b,
    )


def _by_nccl(policy: PolicyConfig, gpus_per_node: int) -> bool:
    """In the Dockerfile's image, which has DeepEP."""
    return dispatcher(policy, gpus_per_node, deepep=True) == "alltoall"


def _sent(shape: ModelShape, policy: PolicyConfig, gpus_per_node: int) -> float:
    """Copies of a token that leave its GPU, for each of its experts: one to every rank that has a part of the expert.
    DeepEP sends one to a rank, however many of the token's experts are there."""
    ranks, chosen = policy.layout.expert, shape.experts_per_token
    if not shape.experts:
        return 0.0
    once = 1.0 if _by_nccl(policy, gpus_per_node) else ranks * (1 - (1 - 1 / ranks) ** chosen) / chosen
    return once * (policy.layout.expert_tensor - 1 / ranks)  # a share of them stays where it is


def link_seconds(
    traffic: Traffic, config: Config, world: WorldShape, assumed: Assumptions
) -> dict[str, float]:
    """Seconds that the GPUs wait for links during an update. Reductions of gradients hide behind computation
    where `overlap` is on, but for a fifth."""
    policy, layout = config.policy, config.policy.layout
    per_node = world.size // config.cluster.nodes

    def rate(ranks: int) -> float:
        """Of a group of neighbours."""
        inside = per_node % ranks == 0
        return (assumed.node_rate if inside else assumed.network_rate) * assumed.link_efficiency

    return {
        "tensor parallelism": traffic.tensor / rate(layout.tensor),
        "context parallelism": traffic.context / rate(layout.tensor * layout.context),
        "experts' exchange": traffic.expert
        / rate(layout.expert * layout.expert_tensor)
        / (assumed.exchange_efficiency if _by_nccl(policy, per_node) else 1.0),
        "pipeline's sends": traffic.pipeline / rate(world.size),
        "gradients' reduction": traffic.data / rate(world.size) * (0.2 if policy.optimizer.overlap else 1.0),
    }


def _share(size: int) -> float:
    """The share of a tensor that a rank sends in a ring of this size."""
    return (size - 1) / size
