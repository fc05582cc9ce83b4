"""An estimate of a step's seconds. Rough by nature: it ranks layouts, and says hours from days."""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.config import Config
from spell_megatron.plan.assumptions import Assumptions
from spell_megatron.plan.engine import Engine
from spell_megatron.plan.parameters import Held, active_parameters, total_parameters
from spell_megatron.plan.resync import resync
from spell_megatron.plan.traffic import Traffic, link_seconds
from spell_megatron.plan.workload import Rollouts, Work, forward_work
from spell_megatron.policy.layout import WorldShape
from spell_megatron.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one training step, one phase after the other."""

    rollout: float
    update: float
    resync: float

    @property
    def total(self) -> float:
        return self.rollout + self.update + self.resync


def update_seconds(
    config: Config,
    world: WorldShape,
    work: Work,
    microbatches: int,
    traffic: Traffic,
    parts: list[Held],
    assumed: Assumptions,
) -> float:
    """`work` is one forward pass over the text of the busiest data-parallel rank."""
    policy, layout = config.policy, config.policy.layout
    passes = 3 if policy.recompute == "none" else 4
    over_pairs = 4 if policy.recompute == "full" else 3
    imbalance = assumed.expert_imbalance if layout.expert > 1 else 1.0
    compute = (passes * work.dense + over_pairs * work.attention) / assumed.dense_efficiency
    compute += passes * work.expert * imbalance / assumed.expert_efficiency
    compute /= world.model * assumed.peak_flops
    bubble = (layout.pipeline - 1) / (microbatches * (layout.virtual_pipeline or 1))
    links = link_seconds(traffic, policy, world, config.cluster.gpus_per_node, assumed)
    owned = max(part.dense for part in parts) / (world.data * layout.context)
    owned += max(part.expert for part in parts) / world.expert_data
    if policy.optimizer.cpu_offload:
        step = (
            owned * (6 + 28) / assumed.host_rate
        )  # gradients there, weights back; AdamW at host memory's rate
    else:
        step = owned * 28 / (assumed.memory_rate * assumed.link_efficiency)
    return compute * (1 + bubble) + links + step


def rollout_seconds(
    config: Config, shape: ModelShape, engine: Engine, rollouts: Rollouts, assumed: Assumptions
) -> float:
    """Reading all prompts once, then decoding in full batches."""
    read = forward_work(shape, rollouts.read, rollouts.read_pairs, 0).total
    reading = read / (engine.gpus * assumed.peak_flops * assumed.prefill_efficiency)
    in_flight = config.selfplay.concurrency * config.selfplay.group_size / engine.engines
    batch = max(1.0, min(config.rollout.max_num_seqs, in_flight))
    weights = total_parameters(shape)
    if shape.experts:  # a batch meets most experts
        met = 1 - (1 - shape.experts_per_token / shape.experts) ** batch
        experts = (weights - active_parameters(shape)) / (1 - shape.experts_per_token / shape.experts)
        weights = round(weights - experts * (1 - met))
    moved = weights * 2 / engine.tensor + batch * rollouts.context * engine.token_bytes
    step = max(assumed.decode_seconds, moved / (assumed.memory_rate * assumed.link_efficiency))
    return reading + rollouts.written / engine.engines / batch * step


def step_seconds(
    config: Config,
    shape: ModelShape,
    world: WorldShape,
    engine: Engine,
    rollouts: Rollouts,
    work: Work,
    microbatches: int,
    traffic: Traffic,
    parts: list[Held],
    assumed: Assumptions,
) -> Seconds:
    return Seconds(
        rollout=rollout_seconds(config, shape, engine, rollouts, assumed),
        update=update_seconds(config, world, work, microbatches, traffic, parts, assumed),
        resync=resync(config, shape, engine).seconds(assumed),
    )
