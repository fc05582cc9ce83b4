"""Seconds of an update on the busiest GPU, kernel by kernel: what it multiplies, moves in memory and sends.

Products take operations over a kernel's rate; all else that a GPU does takes the bytes that it reads and writes.
`docs/scale.md` has the sum of one layer.
"""

from __future__ import annotations

from spell_megatron.config import Config
from spell_megatron.policy.layout import WorldShape, depth
from spell_megatron.tools.plan.activations import FullStream, layer_bytes
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.parameters import StageParameters, width
from spell_megatron.tools.plan.traffic import Traffic, link_seconds
from spell_megatron.tools.plan.workload import Work, head_work, passes
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
    data-parallel rank, context ranks together."""
    layout = config.policy.layout
    computed = {
        **_products(config, shape, world, work, rows, assumed),
        **_memory(config, shape, tokens, rows, assumed),
    }
    bubble = (layout.pipeline - 1) / (microbatches * (layout.virtual_pipeline or 1))
    seconds = {
        **computed,
        "pipeline's bubble": sum(computed.values()) * bubble,
        **link_seconds(traffic, config.policy, world, config.cluster.gpus_per_node, assumed),
        "copies to the host": _offload(config, shape, world, work, tokens, rows, assumed),
        "optimizer's step": _step(config, world, parts, assumed),
    }
    return {name: value for name, value in seconds.items() if value}


def _products(
    config: Config, shape: ModelShape, world: WorldShape, work: Work, rows: float, assumed: Assumptions
) -> dict[str, float]:
    layers, attention = passes(config.policy, shape)
    there, back = _passes_once(config, shape, world, work, rows, assumed)
    seconds = {
        kind: there[kind] * (attention if kind == "attention" else layers) + back[kind] for kind in there
    }
    head = head_work(shape, rows) * (1 + 2) / assumed.dense_rate / world.model
    return {**seconds, "head's products": head}


def _passes_once(
    config: Config, shape: ModelShape, world: WorldShape, work: Work, rows: float, assumed: Assumptions
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of all layers' products, forward and backward. A backward pass multiplies twice what a forward pass does;
    attention's two and a half times, as it begins with the scores."""
    policy = config.policy
    fa3 = policy.attention != "fa2"
    there, back = (
        (assumed.fa3_forward, assumed.fa3_backward) if fa3 else (assumed.fa2_forward, assumed.fa2_backward)
    )
    grouped = assumed.grouped_rate if policy.prefers_te else assumed.looped_rate
    imbalance = assumed.expert_imbalance if policy.layout.expert > 1 else 1.0
    experts = work.expert * imbalance / grouped / world.model
    dense = (work.dense - head_work(shape, rows)) / assumed.dense_rate / world.model
    attention = work.attention / world.model
    forward = {"attention": attention / there, "experts": experts, "dense layers": dense}
    return forward, {
        "attention": 2.5 * attention / back,
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
    config: Config, shape: ModelShape, tokens: float, rows: float, assumed: Assumptions
) -> dict[str, float]:
    """Passes over tensors, counted as reads and writes of each element."""
    policy, layout, b = config.policy, config.policy.layout, width(config.policy)
    te = policy.prefers_te
    forward, attention = passes(policy, shape)
    layers, local = shape.layers / layout.pipeline, tokens / layout.context
    own = local / (layout.tensor if layout.sequence else 1)
    heads, kv = shape.heads / layout.tensor, max(shape.kv_heads / layout.tensor, 1)
    # A norm reads and writes, a residual sum reads two and writes: twice a layer each, backward twice as much.
    bytes_of = {"norms and sums": 10 * own * shape.hidden * b * (forward + 2)}
    rotated = local * (heads + kv) * shape.head_dim * b
    bytes_of["rotations"] = rotated * (2 if te and policy.fusions.rope else 14) * (forward + 1)
    # The sums of pieces are float32: read and written twice each way, and read and written in half precision.
    bytes_of["attention's pieces"] = local * heads * shape.head_dim * 20 * (attention + 2)
    if shape.experts:
        routed = own * shape.experts_per_token
        fused = te and policy.fusions.permute
        moved = routed * shape.hidden * b
        # To experts' order, twice by rank and expert, and back; unfused the sum is made by atomics.
        bytes_of["experts' order"] = moved * (7 if fused else 10) * (forward + 1)
        if not fused:
            bytes_of["experts' order"] += moved * assumed.atomics * (forward + 1)
        active = routed * shape.expert_ffn
    else:
        active = local * shape.ffn / layout.tensor
    bytes_of["activations of MLPs"] = 3 * active * b * (forward + 2)
    bytes_of = {name: size * layers for name, size in bytes_of.items()}
    logits = rows / layout.context * shape.vocab / layout.tensor
    bytes_of["logits"] = logits * assumed.logit_bytes
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
