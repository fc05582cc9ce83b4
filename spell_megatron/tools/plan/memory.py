"""What one rank of every pipeline stage holds in each phase of a step."""

from __future__ import annotations

import math
from dataclasses import replace

from spell_megatron.config import Config
from spell_megatron.policy.layout import WorldShape
from spell_megatron.rollout.transfer.manifest import STAGED_BYTES
from spell_megatron.tools.plan.activations import FullStream, activations
from spell_megatron.tools.plan.assumptions import GIB, Assumptions
from spell_megatron.tools.plan.engine import EngineMemory
from spell_megatron.tools.plan.findings import StagePlan
from spell_megatron.tools.plan.parameters import StageParameters, Static, static_bytes, width
from spell_megatron.tools.plan.rehearsal import Rehearsal
from spell_megatron.types import SpellError
from spell_megatron.weights.shape import ModelShape


def stage_plans(
    config: Config,
    shape: ModelShape,
    world: WorldShape,
    parts: list[StageParameters],
    engine: EngineMemory,
    microbatches: int,
    assumed: Assumptions,
    rehearsal: Rehearsal | None,
) -> list[StagePlan]:
    """One for every pipeline stage. Of a built model (`rehearsal`) what is held comes from it."""
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
                parameters=part,
                static=static,
                activations=acts,
                update=always + asleep + math.ceil(acts.peak * (1 + assumed.fragmentation)),
                rollout=always + awake + (engine.device if engine.colocated else 0),
                resync=always + awake + (engine.weights if engine.colocated else 0) + gathered + staged,
            )
        )
    return stages


def _built(stage: int, part: StageParameters, static: Static, rehearsal: Rehearsal) -> Static:
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


def full_stream(config: Config, assumed: Assumptions) -> FullStream:
    """A stream that fills its budget with one group whose responses are as long as they may be."""
    policy = config.policy
    cp, budget = policy.layout.context, policy.stream_tokens
    replies = config.selfplay.group_size * config.selfplay.sampling.responder_tokens
    prompt = config.corpus.cluster_tokens + min(assumed.template_tokens, config.corpus.cluster_tokens)
    rows = budget * replies / (prompt + replies)
    return FullStream(local=budget / cp, whole=budget, rows=rows / cp)
