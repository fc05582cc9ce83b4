"""A recipe's plan: what every pipeline stage holds in each phase, whether it fits, and what a step costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from spell_megatron.config import Cluster, Config, SelfPlay
from spell_megatron.plan.activations import Activations, Stream, activations
from spell_megatron.plan.assumptions import GIB, Assumptions
from spell_megatron.plan.catalogue import architecture
from spell_megatron.plan.engine import Engine, engine_memory
from spell_megatron.plan.parameters import (
    Held,
    Static,
    active_parameters,
    held,
    static_bytes,
    total_parameters,
    width,
)
from spell_megatron.plan.rehearsal import Job, Rehearsal, rehearse
from spell_megatron.plan.saving import Saving, saving
from spell_megatron.plan.timing import Seconds, step_seconds
from spell_megatron.plan.traffic import Traffic, step_traffic
from spell_megatron.plan.update import update_costs
from spell_megatron.plan.workload import (
    Lengths,
    Rollouts,
    Work,
    batch_work,
    expected_batch,
    forward_work,
    group_lengths,
)
from spell_megatron.policy.layout import WorldShape, check_layout
from spell_megatron.policy.stream import Stream as PackedStream
from spell_megatron.policy.stream import plan_streams
from spell_megatron.rollout.transfer.manifest import STAGED_BYTES
from spell_megatron.types import SpellError, TrainBatch
from spell_megatron.weights.contents import shape_of
from spell_megatron.weights.shape import ModelShape

ROOM = 0.08
"""Share of GPU memory that should stay free at the peak: what the planner cannot see."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One rank of a pipeline stage, in bytes by phase."""

    stage: int
    held: Held
    static: Static
    activations: Activations
    update: int
    rollout: int
    resync: int

    @property
    def peak(self) -> int:
        return max(self.update, self.rollout, self.resync)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe needs. Bytes are of one GPU, operations of the whole run, traffic of one GPU."""

    config: Config
    shape: ModelShape
    world: WorldShape
    stages: tuple[StagePlan, ...]
    engine: Engine
    lengths: Lengths
    streams: int
    """Microbatches of one data-parallel rank in a step."""
    work: Work
    """One forward pass over the batch, as configured."""
    work_shared: Work
    """The same with every prompt computed once."""
    work_unshared: Work
    """The same with every prompt computed anew for each response."""
    traffic: Traffic
    costs: dict[str, float]
    """Seconds of an update, by what takes them."""
    seconds: Seconds
    seconds_unshared: Seconds
    saving: Saving
    faults: tuple[str, ...]
    """Why the recipe cannot run, besides memory."""
    assumed: Assumptions
    rehearsal: Rehearsal | None = None
    """The real model's ranks; None where arithmetic alone speaks."""
    remedies: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        engine = self.engine.device + round(self.assumed.engine_gib * GIB)
        return max([stage.peak for stage in self.stages] + ([] if self.engine.colocated else [engine]))

    @property
    def headroom(self) -> float:
        """Free share of GPU memory at the peak; negative where it does not fit."""
        return 1 - self.peak / (self.config.cluster.gpu_memory_gib * GIB)

    @property
    def fits(self) -> bool:
        return self.headroom >= 0 and not self.faults

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak that an update's operations are, recomputation not counted."""
        return 3 * self.work.total / (self.seconds.update * self.world.size * self.assumed.peak_flops)

    def flops(self, *, shared: bool) -> float:
        """Of a step's update: forward and backward over the batch, without recomputation."""
        return 3 * (self.work_shared if shared else self.work_unshared).total

    def to_dict(self) -> dict[str, Any]:
        """The JSON answer of `spell-megatron plan`."""
        layout = self.config.policy.layout
        return {
            "recipe": self.config.name,
            "model": self.config.model.path,
            "gpus": self.world.size,
            "nodes": self.config.cluster.nodes,
            "engine_gpus": self.engine.gpus,
            "layout": asdict(layout) | {"data": self.world.data},
            "parameters_total": total_parameters(self.shape),
            "parameters_active": active_parameters(self.shape),
            "fits": self.fits,
            "headroom": self.headroom,
            "faults": list(self.faults),
            "remedies": list(self.remedies),
            "per_rank": [self._row(stage) for stage in self.stages],
            "engine": asdict(self.engine),
            "flops_per_step": 3 * self.work.total,
            "flops_per_step_shared": self.flops(shared=True),
            "flops_per_step_unshared": self.flops(shared=False),
            "communication_bytes": asdict(self.traffic) | {"total": self.traffic.total},
            "seconds_per_step": self.seconds.total,
            "seconds": asdict(self.seconds),
            "update_seconds": self.costs,
            "mfu": self.mfu,
            "seconds_per_step_unshared": self.seconds_unshared.total,
            "checkpoint": asdict(self.saving),
            "microbatches": self.streams,
            "built": self.rehearsal is not None,
            "hf_weights_covered": self.rehearsal.hf_weights if self.rehearsal else None,
            "assumptions": asdict(self.assumed),
        }

    def _row(self, stage: StagePlan) -> dict[str, Any]:
        built = [rank for rank in self.rehearsal.ranks if rank.stage == stage.stage] if self.rehearsal else []
        return {
            "stage": stage.stage,
            "ranks": self.world.size // self.config.policy.layout.pipeline,
            "layers": stage.held.layers,
            "parameters": stage.held.total,
            "parameters_expert": stage.held.expert,
            "weights": stage.static.weights,
            "gradients": stage.static.gradients,
            "optimizer": stage.static.optimizer,
            "optimizer_on_host": stage.static.host,
            "activations": asdict(stage.activations) | {"peak": stage.activations.peak},
            "update": stage.update,
            "rollout": stage.rollout,
            "resync": stage.resync,
            "shapes": built[0].shapes if built else {},
        }

    def table(self) -> str:
        from spell_megatron.plan.table import render

        return render(self)


def plan(config: Config, gpus: int | None = None, gpu_memory_gib: float | None = None) -> Plan:
    """Plan a recipe, on its own cluster or on `gpus` GPUs of `gpu_memory_gib`. LayoutError where it cannot run."""
    return plan_all([resized(config, gpus, gpu_memory_gib)])[0]


def plan_all(configs: Sequence[Config], assumed: Assumptions | None = None) -> list[Plan]:
    """Plan several recipes, their models built in one process. SpellError where a model contradicts arithmetic."""
    from spell_megatron.plan.search import remedies

    assumed = assumed or Assumptions()
    drafts = [estimate(config, assumed) for config in configs]
    jobs = [Job(c.policy, architecture(c.model.path), c.cluster.gpus, c.model.families) for c in configs]
    plans = []
    for draft, rehearsal in zip(drafts, rehearse(jobs), strict=True):
        built = estimate(draft.config, assumed, rehearsal)
        plans.append(built if _fits_well(built) else replace(built, remedies=tuple(remedies(draft))))
    return plans


def _fits_well(found: Plan) -> bool:
    return found.fits and found.headroom >= ROOM


def resized(config: Config, gpus: int | None, gpu_memory_gib: float | None) -> Config:
    """The same recipe on another number of GPUs, of another size."""
    cluster = config.cluster
    if gpus is not None:
        per_node = min(gpus, cluster.gpus_per_node)
        if gpus < 1 or gpus % per_node:
            raise SpellError(
                f"{gpus} GPUs do not fill nodes of {per_node}: give a multiple, or set cluster.gpus_per_node"
            )
        cluster = replace(cluster, nodes=gpus // per_node, gpus_per_node=per_node)
    if gpu_memory_gib is not None:
        cluster = replace(cluster, gpu_memory_gib=gpu_memory_gib)
    return replace(config, cluster=cluster)


def estimate(config: Config, assumed: Assumptions, rehearsal: Rehearsal | None = None) -> Plan:
    """The plan by arithmetic. With a built model, what a rank holds comes from it, and the batch is really packed."""
    policy, cluster = config.policy, config.cluster
    shape = shape_of(architecture(config.model.path), config.model.families)
    world = check_layout(policy.layout, shape, cluster.gpus)
    parts = held(shape, policy.layout)
    lengths = Lengths.of(config, assumed)
    engine = engine_memory(config, shape, lengths, cluster.nodes, cluster.gpu_memory_gib, assumed)
    batch = expected_batch(config.selfplay, lengths)
    faults = _faults(config, shape, engine, cluster)
    if rehearsal is not None:
        dealt = _packed(config, shape, world, lengths)
    else:
        dealt = _even(config, shape, world, lengths, shared=policy.share_prompts)
    unshared = _even(config, shape, world, lengths, shared=False)
    rollouts = Rollouts.of(config, lengths, assumed)

    def costs(deal: _Deal) -> dict[str, float]:
        traffic = _traffic(config, shape, world, parts, deal)
        return update_costs(
            config, shape, world, deal.busiest, deal.tokens, deal.rows, deal.streams, traffic, parts, assumed
        )

    def seconds(update: dict[str, float]) -> Seconds:
        return step_seconds(config, shape, engine, rollouts, update, assumed)

    update = costs(dealt)
    stages = _stages(config, shape, world, parts, engine, dealt.streams, assumed, rehearsal)
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
        saving=saving(config, world, parts, [stage.static for stage in stages], engine, assumed),
        faults=tuple(faults),
        assumed=assumed,
        rehearsal=rehearsal,
    )


@dataclass(frozen=True, slots=True)
class _Deal:
    """How the batch falls on data-parallel ranks."""

    streams: int
    busiest: Work
    tokens: float
    rows: float


def _packed(config: Config, shape: ModelShape, world: WorldShape, lengths: Lengths) -> _Deal:
    """As the learner packs and deals the batch; takes seconds for long texts."""
    policy = config.policy
    multiple = policy.layout.pipeline if policy.layout.virtual_pipeline else 1
    return _dealt(
        config.selfplay, lengths, shape, policy.stream_tokens, world.data, multiple, policy.share_prompts
    )


def _even(config: Config, shape: ModelShape, world: WorldShape, lengths: Lengths, *, shared: bool) -> _Deal:
    """In perfect balance and without a gap in any stream."""
    pairs = list(group_lengths(expected_batch(config.selfplay, lengths)))
    work = batch_work(shape, pairs, shared=shared)
    rows = sum(sum(replies) for _, replies in pairs) / world.data
    tokens = (
        sum(prompt * (1 if shared else len(replies)) + sum(replies) for prompt, replies in pairs) / world.data
    )
    return _Deal(math.ceil(tokens / config.policy.stream_tokens), work.over(world.data), tokens, rows)


@cache
def _dealt(
    play: SelfPlay, lengths: Lengths, shape: ModelShape, budget: int, data: int, multiple: int, shared: bool
) -> _Deal:
    batch = expected_batch(play, lengths)
    ranks = plan_streams(
        batch,
        budget=max(budget, _longest(batch)),
        data_size=data,
        multiple=multiple,
        share_prompts=shared,
        token_work=forward_work(shape, 1, 0, 0).total / forward_work(shape, 0, 1, 0).total,
    )
    busiest, tokens, rows = Work(0, 0, 0), 0.0, 0.0
    for rank in ranks:
        pairs = [pair for stream in rank for pair in _lengths(stream, batch)]
        work = batch_work(shape, pairs, shared=True)
        if work.total > busiest.total:
            busiest = work
        tokens = max(tokens, sum(prompt + sum(replies) for prompt, replies in pairs))
        rows = max(rows, sum(sum(replies) for _, replies in pairs))
    return _Deal(len(ranks[0]), busiest, tokens, rows)


def _lengths(stream: PackedStream, batch: TrainBatch) -> list[tuple[int, list[int]]]:
    return [(len(prompt), [len(reply) for reply in replies]) for prompt, replies in stream.layout(batch)]


def _longest(batch: TrainBatch) -> int:
    return max(len(group.prompt) + max(len(s.tokens) for s in group.samples) for group in batch.groups)


def _traffic(config: Config, shape: ModelShape, world: WorldShape, parts: list[Held], deal: _Deal) -> Traffic:
    return step_traffic(shape, config.policy, world, parts, deal.tokens, deal.rows)


def _stages(
    config: Config,
    shape: ModelShape,
    world: WorldShape,
    parts: list[Held],
    engine: Engine,
    microbatches: int,
    assumed: Assumptions,
    rehearsal: Rehearsal | None,
) -> list[StagePlan]:
    policy = config.policy
    stream = full_stream(config, assumed)
    trainer = round(assumed.trainer_gib * GIB)
    awake = round(assumed.engine_gib * GIB) if engine.colocated else 0
    asleep = round(assumed.asleep_gib * GIB) if engine.colocated else 0
    largest = shape.vocab * shape.hidden * width(policy)
    gathered = 2 * largest  # in parts and whole
    staged = max(STAGED_BYTES, largest) if engine.colocated else 0
    stages = []
    for index, part in enumerate(parts):
        static = static_bytes(part, policy, world)
        if rehearsal is not None:
            static = _built(index, part, static, rehearsal)
        acts = activations(shape, policy, index, stream, microbatches, assumed)
        always = static.device + trainer
        stages.append(
            StagePlan(
                stage=index,
                held=part,
                static=static,
                activations=acts,
                update=always + asleep + math.ceil(acts.peak * (1 + assumed.fragmentation)),
                rollout=always + awake + (engine.device if engine.colocated else 0),
                resync=always + awake + (engine.weights if engine.colocated else 0) + gathered + staged,
            )
        )
    return stages


def _built(stage: int, part: Held, static: Static, rehearsal: Rehearsal) -> Static:
    """Bytes of the stage's built ranks, the largest of them; arithmetic must agree on the parameters."""
    ranks = [rank for rank in rehearsal.ranks if rank.stage == stage]
    for rank in ranks:
        if (rank.dense, rank.expert) != (part.dense, part.expert):
            raise SpellError(
                f"pipeline stage {stage}: the model has {rank.dense} + {rank.expert} parameters on rank {rank.rank},"
                f" arithmetic says {part.dense} + {part.expert}; the planner does not understand this model"
            )
    return replace(
        static,
        weights=max(rank.weights for rank in ranks),
        gradients=max(rank.gradients for rank in ranks),
        optimizer=max(rank.optimizer for rank in ranks),
    )


def full_stream(config: Config, assumed: Assumptions) -> Stream:
    """A stream that fills its budget with one group whose responses are as long as they may be."""
    policy = config.policy
    cp, budget = policy.layout.context, policy.stream_tokens
    replies = config.selfplay.group_size * config.selfplay.sampling.responder_tokens
    prompt = config.corpus.cluster_tokens + min(assumed.template_tokens, config.corpus.cluster_tokens)
    rows = budget * replies / (prompt + replies)
    return Stream(local=budget / cp, whole=budget, rows=rows / cp)


def _faults(config: Config, shape: ModelShape, engine: Engine, cluster: Cluster) -> list[str]:
    """Contradictions between model, lengths, engine and cluster that no memory would mend."""
    rollout, play, faults = config.rollout, config.selfplay, []
    limits = play.sampling
    longest = config.corpus.cluster_tokens + max(limits.questioner_tokens, limits.responder_tokens)
    if longest > rollout.max_model_len:
        faults.append(
            f"rollout.max_model_len={rollout.max_model_len} is below cluster and response: {longest}"
        )
    if rollout.max_model_len > config.policy.stream_tokens:
        faults.append(
            f"policy.stream_tokens={config.policy.stream_tokens} cannot hold a sequence of"
            f" rollout.max_model_len={rollout.max_model_len}"
        )
    if engine.fault:
        faults.append(engine.fault)
    if shape.heads % engine.tensor:
        faults.append(f"rollout.servers.tensor={engine.tensor} does not divide {shape.heads} heads")
    wanted = max(engine.kv_wanted, engine.sequence)
    if engine.kv_cache < wanted:
        faults.append(
            f"a KV cache of {engine.kv_cache / GIB:.1f} GiB is below the {wanted / GIB:.1f} GiB of the planned"
            f" {play.concurrency} questions in flight: raise rollout.kv_cache_mib, or lower selfplay.concurrency"
        )
    return faults


def notes(found: Plan) -> list[str]:
    """What the user must see to besides GPU memory."""
    limit, length, lines = found.shape.max_positions, found.config.rollout.max_model_len, []
    if length > limit:
        lines.append(
            f"sequences of {length} tokens exceed the model's {limit} positions: its config.json needs a YaRN"
            f" rope_scaling of factor {math.ceil(length / limit)} or more"
        )
    return lines
