"""Seconds of an update on the busiest GPU, kernel by kernel: what it multiplies, moves in memory and sends.

Products take operations over a kernel's rate; all else that a GPU does takes the bytes that it reads and writes.
`docs/scale.md` has the sum of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.config import Config, PolicyConfig
from spell_megatron.policy.layout import WorldShape, depth
from spell_megatron.tools.plan.activations import FullStream, layer_bytes
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.parameters import StageParameters, width
from spell_megatron.tools.plan.traffic import Traffic, link_seconds
from spell_megatron.tools.plan.workload import (
    SCORING,
    PassCount,
    Work,
    head_backward,
    head_work,
    passes,
    scorings,
)
from spell_megatron.weights.shape import ModelShape


def update_costs(
    config: Config,
    shape: ModelShape,
    world: WorldShape,
    work: Work,
    tokens: float,
    rows: float,
    microbatches: int,
    traffic: Traffic,
    parts: list[StageParameters],
    assumed: Assumptions,
) -> dict[str, float]:
    """By what takes them. `work`, `tokens` and predicted `rows` are of one forward pass over the text of the busiest
    data-parallel rank, context ranks together; `microbatches` are its streams, of all minibatches."""
    policy, layout = config.policy, config.policy.layout

    def computed(count: PassCount) -> dict[str, float]:
        return {
            **_products(config, shape, world, work, rows, microbatches, count, assumed),
            **_memory(config, shape, tokens, rows, count, assumed),
        }

    trained = computed(passes(policy, shape))
    scored = scorings(policy) * sum(computed(SCORING).values())
    # A pipeline fills and drains in every minibatch, and in every scoring of the whole batch.
    fills = (layout.pipeline - 1) / (layout.virtual_pipeline or 1)
    bubble = fills * sum(trained.values()) / max(1.0, microbatches / policy.minibatches)
    seconds = {
        **trained,
        "scoring": scored,
        "pipeline's bubble": bubble + fills * scored / microbatches,
        **link_seconds(traffic, config, world, assumed),
        "copies to the host": _offload(config, shape, world, work, tokens, rows, assumed),
        "optimizer's step": _step(config, world, parts, assumed) * policy.minibatches,
    }
    return {name: value for name, value in seconds.items() if value}


@dataclass(frozen=True, slots=True)
class _Rates:
    """Operations a second."""

    attention: float
    attention_backward: float
    experts: float
    dense: float

    @classmethod
    def of(cls, policy: PolicyConfig, assumed: Assumptions) -> _Rates:
        if policy.dtype == "float32":  # by torch without tensor cores: `policy/kernels/plain.py`
            return cls(*[assumed.float32_rate] * 4)
        experts = assumed.grouped_rate if policy.prefers_te else assumed.looped_rate
        if policy.attention == "fa2":
            return cls(assumed.fa2_forward, assumed.fa2_backward, experts, assumed.dense_rate)
        return cls(assumed.fa3_forward, assumed.fa3_backward, experts, assumed.dense_rate)


def _products(
    config: Config,
    shape: ModelShape,
    world: WorldShape,
    work: Work,
    rows: float,
    microbatches: int,
    count: PassCount,
    assumed: Assumptions,
) -> dict[str, float]:
    there, back = _passes_once(config, shape, world, work, rows, assumed)
    seconds = {
        kind: there[kind] * (count.attention if kind == "attention" else count.layers)
        + back[kind] * count.backward
        for kind in there
    }
    back_passes = head_backward(rows / config.policy.layout.context / microbatches, config.policy.head_chunk)
    head = head_work(shape, rows) / _Rates.of(config.policy, assumed).dense / world.model
    return {**seconds, "head's products": head * (1 + count.backward * back_passes)}


def _passes_once(
    config: Config, shape: ModelShape, world: WorldShape, work: Work, rows: float, assumed: Assumptions
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of all layers' products, forward and backward. A backward pass multiplies twice what a forward pass does;
    attention's two and a half times, as it begins with the scores."""
    policy, rates = config.policy, _Rates.of(config.policy, assumed)
    imbalance = assumed.expert_imbalance if policy.layout.expert > 1 else 1.0
    experts = work.expert * imbalance / rates.experts / world.model
    dense = (work.dense - head_work(shape, rows)) / rates.dense / world.model
    attention = work.attention / world.model
    forward = {"attention": attention / rates.attention, "experts": experts, "dense layers": dense}
    return forward, {
        "attention": 2.5 * attention / rates.attention_backward,
        "experts": 2 * experts,
        "dense layers": 2 * dense,
    }


def _offload(
    config: Config,
    shape: ModelShape,
    world: WorldShape,
    work: Work,
    tokens: float,
    rows: float,
    assumed: Assumptions,
) -> float:
    """Seconds that layers' products do not hide of copies to the host and back; of what else they do, none."""
    policy, layout = config.policy, config.policy.layout
    local = tokens / layout.context
    batch = FullStream(local=local, whole=tokens, rows=rows / layout.context)
    copy = layer_bytes(shape, policy, batch, assumed) / assumed.host_rate
    own = shape.layers / layout.pipeline
    hidden = [sum(way.values()) / own for way in _passes_once(config, shape, world, work, rows, assumed)]
    chunk = depth(policy, shape)
    between = (chunk.offloaded + chunk.kept) / max(chunk.offloaded, 1)
    copied = chunk.offloaded * (layout.virtual_pipeline or 1)
    return copied * sum(max(0.0, copy - between * seconds) for seconds in hidden)


def _memory(
    config: Config, shape: ModelShape, tokens: float, rows: float, count: PassCount, assumed: Assumptions
) -> dict[str, float]:
    """Passes over tensors, counted as reads and writes of each element."""
    policy, layout, b = config.policy, config.policy.layout, width(config.policy)
    te = policy.prefers_te
    forward, back = count.layers, count.backward
    layers, local = shape.layers / layout.pipeline, tokens / layout.context
    own = local / (layout.tensor if layout.sequence else 1)
    heads, kv = shape.heads / layout.tensor, max(shape.kv_heads / layout.tensor, 1)
    # A norm reads and writes, a residual sum reads two and writes: twice a layer each, backward twice as much.
    bytes_of = {"norms and sums": 10 * own * shape.hidden * b * (forward + 2 * back)}
    rotated = local * (heads + kv) * shape.head_dim * b
    bytes_of["rotations"] = rotated * (2 if te and policy.fusions.rope else 14) * (forward + back)
    # The sums of pieces are float32: read and written twice each way, and read and written in half precision.
    bytes_of["attention's pieces"] = local * heads * shape.head_dim * 20 * (count.attention + 2 * back)
    if shape.experts:
        routed = own * shape.experts_per_token
        fused = te and policy.fusions.permute
        moved = routed * shape.hidden * b
        # To experts' order, twice by rank and expert, and back; unfused the sum is made by atomics.
        bytes_of["experts' order"] = moved * (7 if fused else 10) * (forward + back)
        if not fused:
            bytes_of["experts' order"] += moved * assumed.atomics * (forward + back)
        active = routed * shape.expert_ffn
    else:
        active = local * shape.ffn / layout.tensor
    bytes_of["activations of MLPs"] = 3 * active * b * (forward + 2 * back)
    bytes_of = {name: size * layers for name, size in bytes_of.items()}
    logits = rows / layout.context * shape.vocab / layout.tensor
    bytes_of["logits"] = logits * (assumed.logit_bytes if back else assumed.scored_logit_bytes)
    if config.selfplay.sampling.top_p < 1:
        bytes_of["nucleus"] = logits * assumed.nucleus_bytes
    rate = assumed.memory_rate * assumed.memory_efficiency
    return {name: size / rate for name, size in bytes_of.items()}


def _step(config: Config, world: WorldShape, parts: list[StageParameters], assumed: Assumptions) -> float:
    """Seconds of AdamW: 28 bytes a parameter, in the memory where its state is."""
    policy = config.policy
    owned = max(part.dense for part in parts) / (world.data * policy.layout.context)
    owned += max(part.expert for part in parts) / world.expert_data
    if policy.optimizer.cpu_offload:  # gradients there, weights back; AdamW at host memory's rate
        return owned * (6 + 28) / assumed.host_rate
    return owned * 28 / (assumed.memory_rate * assumed.memory_efficiency)
