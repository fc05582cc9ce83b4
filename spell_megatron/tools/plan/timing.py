"""An estimate of a step's seconds. Rough by nature: it ranks layouts, and says hours from days."""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.config import Config
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.engine import EngineMemory
from spell_megatron.tools.plan.parameters import active_parameters, total_parameters
from spell_megatron.tools.plan.resync import resync
from spell_megatron.tools.plan.workload import Rollouts, forward_work
from spell_megatron.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of one training step, by phase."""

    rollout: float
    update: float
    resync: float
    overlapped: bool = False
    """One step is played while another trains (`selfplay.max_staleness`): the longer of the two sets the pace."""

    @property
    def total(self) -> float:
        longer = max(self.rollout, self.update)
        return (longer if self.overlapped else self.rollout + self.update) + self.resync


def rollout_seconds(
    config: Config, shape: ModelShape, engine: EngineMemory, rollouts: Rollouts, assumed: Assumptions
) -> float:
    """Reading all prompts once, then decoding in full batches, as large as the KV cache allows."""
    read = forward_work(shape, rollouts.read, rollouts.read_pairs, 0).total
    rate = assumed.peak_flops * assumed.prefill_efficiency
    if config.rollout.dtype == "float32":
        rate = assumed.float32_rate
    reading = read / (engine.gpus * rate)
    in_flight = config.selfplay.concurrency * config.selfplay.group_size / engine.engines * engine.fitting
    batch = max(1.0, min(config.rollout.max_num_seqs, in_flight))
    weights = whole = total_parameters(shape)
    if shape.experts:  # a batch meets most experts
        met = 1 - (1 - shape.experts_per_token / shape.experts) ** batch
        experts = (weights - active_parameters(shape)) / (1 - shape.experts_per_token / shape.experts)
        weights = round(weights - experts * (1 - met))
    moved = weights / whole * engine.weights + batch * rollouts.context * engine.token_bytes
    step = max(assumed.decode_seconds, moved / (assumed.memory_rate * assumed.link_efficiency))
    return reading + rollouts.written / engine.engines / batch * step


def step_seconds(
    config: Config,
    shape: ModelShape,
    engine: EngineMemory,
    rollouts: Rollouts,
    update: dict[str, float],
    assumed: Assumptions,
) -> Seconds:
    """`update` is what `update_costs` says."""
    return Seconds(
        rollout=rollout_seconds(config, shape, engine, rollouts, assumed),
        update=sum(update.values()),
        resync=resync(config, shape, engine).seconds(assumed),
        overlapped=config.selfplay.max_staleness > 0,
    )
