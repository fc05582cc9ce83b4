"""How many parameters a rank of every pipeline stage holds, by arithmetic on the model's shape. No torch.

The planner checks these numbers against the model that it really builds; layouts are searched with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.config import LayoutConfig, PolicyConfig
from spell_megatron.policy.layout import WorldShape
from spell_megatron.weights.shape import ModelShape
from spell_megatron.weights.table import EMBEDDING, Row, Split


@dataclass(frozen=True, slots=True)
class StageParameters:
    """How many parameters one rank of a pipeline stage has, by the group of ranks that have copies of them."""

    layers: int
    dense: int
    """Copied over data- and context-parallel ranks."""
    expert: int
    """Copied over expert-data-parallel ranks."""

    @property
    def total(self) -> int:
        return self.dense + self.expert


@dataclass(frozen=True, slots=True)
class Static:
    """Bytes that one rank holds from the first step to the last."""

    weights: int
    gradients: int
    optimizer: int
    reference: int = 0
    """Weights of the reference model, where the loss has one (`policy.loss.kl`)."""
    host: int = 0
    """In host memory: an offloaded optimizer's state, and the gradients that it is given."""

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference


def stage_parameters(shape: ModelShape, layout: LayoutConfig) -> list[StageParameters]:
    """Of each pipeline stage, in order."""
    layer = expert = before = after = 0
    for row in shape.rows():
        part = _part(shape, row, layout)
        if row.expert:
            expert += part * shape.experts // layout.expert
        elif row.layered:
            layer += part
        elif row.megatron == EMBEDDING:
            before = part
        else:
            after += part
    layers, stages = shape.layers // layout.pipeline, []
    for stage in range(layout.pipeline):
        first, last = stage == 0, stage == layout.pipeline - 1
        outer = first * before + last * after
        if last and not first and shape.tied:  # the head has a copy of the embedding
            outer += before
        stages.append(StageParameters(layers, layers * layer + outer, layers * expert))
    return stages


def _part(shape: ModelShape, row: Row, layout: LayoutConfig) -> int:
    """Elements of a row's parameter on one rank."""
    if row.split is Split.REPLICATED:
        return shape.elements(row)
    return shape.elements(row) // (layout.expert_tensor if row.expert else layout.tensor)


def total_parameters(shape: ModelShape) -> int:
    return stage_parameters(shape, LayoutConfig())[0].total


def active_parameters(shape: ModelShape) -> int:
    """Those that one token meets."""
    whole = stage_parameters(shape, LayoutConfig())[0]
    return whole.dense + (whole.expert * shape.experts_per_token // shape.experts if shape.experts else 0)


def width(policy: PolicyConfig) -> int:
    """Bytes of a weight in computation."""
    return 4 if policy.dtype == "float32" else 2


def state_width(policy: PolicyConfig) -> int:
    """Bytes of AdamW's state for a weight: two moments in float32, and a master copy where weights are narrower."""
    return 12 if policy.master_weights else 8


def share(part: StageParameters, policy: PolicyConfig, world: WorldShape) -> int:
    """Parameters of which one rank steps for all that hold a copy, where the optimizer is distributed."""
    copies = world.data * policy.layout.context
    return -(-part.dense // copies) + -(-part.expert // world.expert_data)


def static_bytes(part: StageParameters, policy: PolicyConfig, world: WorldShape) -> Static:
    """Weights, float32 gradients, AdamW's float32 master copy and two moments, and a frozen second model's weights."""
    state, optimizer = state_width(policy), policy.optimizer
    owned = share(part, policy, world) if optimizer.distributed else part.total
    weights, gradients = part.total * width(policy), part.total * 4
    reference = weights if policy.loss.kl > 0 else 0
    if optimizer.cpu_offload:
        return Static(weights, gradients, 0, reference, host=(state + 4) * owned)
    return Static(weights, gradients, state * owned, reference)
