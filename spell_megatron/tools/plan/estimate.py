"""A recipe's plan by arithmetic alone, or with what its built model says."""

from __future__ import annotations

from spell_megatron.base.topology import topology
from spell_megatron.config import Config, ConfigError, untrainable
from spell_megatron.policy.layout import WorldShape, check_policy
from spell_megatron.tools.plan.assumptions import GIB, Assumptions
from spell_megatron.tools.plan.catalogue import architecture
from spell_megatron.tools.plan.dealing import Deal, even, packed
from spell_megatron.tools.plan.engine import EngineMemory, engine_memory
from spell_megatron.tools.plan.findings import Plan
from spell_megatron.tools.plan.memory import stage_plans
from spell_megatron.tools.plan.notes import notes
from spell_megatron.tools.plan.parameters import StageParameters, stage_parameters
from spell_megatron.tools.plan.rehearsal import Rehearsal
from spell_megatron.tools.plan.saving import saving
from spell_megatron.tools.plan.timing import Seconds, step_seconds
from spell_megatron.tools.plan.traffic import Traffic, step_traffic
from spell_megatron.tools.plan.update import update_costs
from spell_megatron.tools.plan.workload import Lengths, Rollouts, batch_work, expected_batch, group_lengths
from spell_megatron.weights.contents import shape_of
from spell_megatron.weights.shape import ModelShape


def estimate(config: Config, assumed: Assumptions, rehearsal: Rehearsal | None = None) -> Plan:
    """The plan by arithmetic. With a built model, what a rank holds comes from it, and the batch is really packed."""
    policy, cluster = config.policy, config.cluster
    shape = shape_of(architecture(config.model.path), config.model.families)
    world = check_policy(policy, shape, _ranks(config))
    parts = stage_parameters(shape, policy.layout)
    lengths = Lengths.of(config, assumed)
    engine = engine_memory(config, shape, lengths, cluster.nodes, cluster.gpu_memory_gib, assumed)
    batch = expected_batch(config.selfplay, lengths)
    faults = _faults(config, shape, engine)
    if rehearsal is not None:
        dealt = packed(config, shape, world, lengths)
    else:
        dealt = even(config, shape, world, lengths, shared=policy.share_prompts)
    unshared = even(config, shape, world, lengths, shared=False)
    rollouts = Rollouts.of(config, lengths, assumed)

    def costs(deal: Deal) -> dict[str, float]:
        traffic = _traffic(config, shape, world, parts, deal)
        return update_costs(
            config, shape, world, deal.busiest, deal.tokens, deal.rows, deal.streams, traffic, parts, assumed
        )

    def seconds(update: dict[str, float]) -> Seconds:
        return step_seconds(config, shape, engine, rollouts, update, assumed)

    update = costs(dealt)
    streams = -(-dealt.streams // policy.minibatches)
    stages = stage_plans(config, shape, world, parts, engine, streams, assumed, rehearsal)
    return Plan(
        config=config,
        shape=shape,
        world=world,
        stages=tuple(stages),
        engine=engine,
        lengths=lengths,
        streams=dealt.streams,
        work=batch_work(shape, group_lengths(batch), shared=policy.share_prompts),
        work_shared=batch_work(shape, group_lengths(batch), shared=True),
        work_unshared=batch_work(shape, group_lengths(batch), shared=False),
        traffic=_traffic(config, shape, world, parts, dealt),
        costs=update,
        seconds=seconds(update),
        seconds_unshared=seconds(costs(unshared)),
        saving=saving(
            config,
            world,
            parts,
            [stage.static for stage in stages],
            max(stage.activations.host for stage in stages),
            engine,
            assumed,
        ),
        faults=tuple(faults),
        notes=tuple(notes(config, shape, engine)),
        assumed=assumed,
        rehearsal=rehearsal,
    )


def _ranks(config: Config) -> int:
    """Of the trainer, on the GPUs that no engine has for itself. Where engines cannot be placed, which is a fault of
    theirs, it has all."""
    try:
        return len(topology(config, cuda=True, gpus=config.cluster.gpus_per_node).trainer)
    except ConfigError:
        return config.cluster.gpus


def _traffic(
    config: Config, shape: ModelShape, world: WorldShape, parts: list[StageParameters], deal: Deal
) -> Traffic:
    per_node = world.size // config.cluster.nodes
    return step_traffic(shape, config.policy, world, parts, deal.tokens, deal.rows, per_node)


def _faults(config: Config, shape: ModelShape, engine: EngineMemory) -> list[str]:
    """Contradictions between model, lengths, engine and GPUs that no memory would mend."""
    rollout, limits, faults = config.rollout, config.selfplay.sampling, []
    longest = config.corpus.cluster_tokens + max(limits.questioner_tokens, limits.responder_tokens)
    if longest > rollout.max_model_len:
        faults.append(
            f"rollout.max_model_len={rollout.max_model_len} is below cluster and response: {longest}"
        )
    faults += filter(None, (untrainable(config), engine.fault))
    if shape.heads % engine.tensor:
        faults.append(f"rollout.servers.tensor={engine.tensor} does not divide {shape.heads} heads")
    if engine.kv_cache < engine.sequence:
        faults.append(
            f"a KV cache of {engine.kv_cache / GIB:.1f} GiB is below the {engine.sequence / GIB:.1f} GiB of one"
            f" sequence of rollout.max_model_len={rollout.max_model_len}: raise rollout.kv_cache_mib, or lower that"
        )
    if config.policy.fp8 == "mxfp8":
        faults.append("policy.fp8=mxfp8 is for Blackwell, and an H100 is planned: set policy.fp8=blockwise")
    return faults
