"""Bytes of activations at the peak of an update, by what the layers keep for their backward pass. No torch.

The terms follow `policy/layers.py`, `policy/attention.py` and `policy/head.py` tensor by tensor;
`tests/tools/test_plan.py` compares their sum with what real learners hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from spell_megatron.config import LayoutConfig, PolicyConfig
from spell_megatron.policy.layout import depth
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.parameters import width
from spell_megatron.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class FullStream:
    """The tokens of one rank's part of a full stream."""

    local: float
    """Tokens that this rank computes: the stream's over the context-parallel ranks."""
    whole: float
    """Tokens whose keys and values it sees."""
    rows: float
    """Response tokens that it predicts."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes by phase; the peak is what is kept for all microbatches in flight plus the largest passing need."""

    kept: int
    """For backward, by all microbatches in flight."""
    recomputed: int
    """One layer's own, where all are computed again; else it comes when more than that has gone."""
    layer: int
    """Gradients that pass through one layer's backward, and what context parallelism gathers."""
    head: int
    """A chunk of logits and the head's gradient, on the last stage."""
    microbatches: float
    """In flight at the peak."""
    host: int
    """In pinned host memory, of offloaded layers."""

    @property
    def peak(self) -> int:
        return self.kept + max(self.recomputed + self.layer, self.head)


def activations(
    shape: ModelShape,
    policy: PolicyConfig,
    stage: int,
    stream: FullStream,
    microbatches: int,
    assumed: Assumptions,
) -> Activations:
    """At the peak of an update on a rank of a pipeline stage, for streams that fill their budget."""
    layout, b = policy.layout, width(policy)
    last = stage == layout.pipeline - 1
    residual = stream.local * shape.hidden * b / _sequence(layout)
    layer, chunk = layer_bytes(shape, policy, stream, assumed), depth(policy, shape)
    attended = _attended(shape, policy, stream) if policy.recompute == "all_but_attention" else 0.0
    whole = chunk.kept + (1 if chunk.offloaded else 0)  # the one that leaves last, or comes back first
    in_flight = _in_flight(layout, stage, microbatches)
    kept = in_flight * (chunk.recomputed * (residual + attended) + whole * layer)
    if policy.recompute != "none":
        kept += stream.local * shape.head_dim * 4  # rotary angles
    vocabulary, c = shape.vocab / layout.tensor, min(policy.head_chunk, stream.rows)
    table = vocabulary * shape.hidden
    final = residual + stream.rows * shape.hidden * b
    forward = 16 * c * vocabulary + stream.local * shape.hidden * b
    backward = (4 + b) * table + (12 + b % 4) * c * vocabulary + stream.rows * shape.hidden * b
    return Activations(
        kept=round(kept),
        recomputed=0 if whole else round(layer - residual - attended),
        layer=round(_passing(shape, policy, stream, assumed)),
        head=round(final + max(forward, backward)) if last else 0,
        microbatches=in_flight / (layout.virtual_pipeline or 1),
        host=round(in_flight * chunk.offloaded * layer * assumed.pinned_rounding),
    )


def layer_bytes(shape: ModelShape, policy: PolicyConfig, stream: FullStream, assumed: Assumptions) -> float:
    """All that one layer keeps for its backward pass."""
    return _attention(shape, policy, stream) + _mlp(shape, policy.layout, stream, width(policy), assumed)


def _in_flight(layout: LayoutConfig, stage: int, microbatches: int) -> int:
    """Chunk passes whose backward has not begun, in Megatron's 1F1B and interleaved schedules."""
    ahead = layout.pipeline - stage - 1
    if layout.virtual_pipeline is None:
        return min(ahead + 1, microbatches)
    warm_up = 2 * ahead + (layout.virtual_pipeline - 1) * layout.pipeline
    return min(warm_up + 1, microbatches * layout.virtual_pipeline)


def _sequence(layout: LayoutConfig) -> int:
    return layout.tensor if layout.sequence else 1


def _heads(shape: ModelShape, layout: LayoutConfig) -> tuple[float, float]:
    return shape.heads / layout.tensor, max(shape.kv_heads / layout.tensor, 1.0)


def _normed(shape: ModelShape, layout: LayoutConfig, tokens: float, b: int) -> float:
    """The input of a norm, which it keeps, and its output, which the next linear layer keeps."""
    return tokens * shape.hidden * b * 2 / _sequence(layout)


def _attention(shape: ModelShape, policy: PolicyConfig, stream: FullStream) -> float:
    layout, b, d = policy.layout, width(policy), shape.head_dim
    heads, kv = _heads(shape, layout)
    projected = heads + 2 * kv
    values = 4.0  # sines and cosines, of queries and of keys; the rest in units of a head
    if shape.family.qk_norm:  # the merged projection, since the key is a view of it, and the query's copy
        values += projected + heads
    values += heads + 2 * kv
    kept = stream.local * values * d * b
    return _normed(shape, layout, stream.local, b) + kept + _attended(shape, policy, stream)


def _attended(shape: ModelShape, policy: PolicyConfig, stream: FullStream) -> float:
    """What queries got, and its log-sum-exp in float32."""
    heads, _ = _heads(shape, policy.layout)
    return stream.local * heads * (shape.head_dim * width(policy) + 4)


def _routed(shape: ModelShape, layout: LayoutConfig, stream: FullStream, assumed: Assumptions) -> float:
    """Rows that a rank's experts compute."""
    rows = stream.local * shape.experts_per_token / _sequence(layout) * layout.expert_tensor
    return rows * (assumed.expert_imbalance if layout.expert > 1 else 1.0)


def _mlp(shape: ModelShape, layout: LayoutConfig, stream: FullStream, b: int, assumed: Assumptions) -> float:
    normed = _normed(shape, layout, stream.local, b)
    if not shape.experts:
        # gate and up (2), and the product of one's silu with the other
        return normed + stream.local * 3 * shape.ffn / layout.tensor * b
    # The same, times the router's weight, and the experts' input.
    rows = _routed(shape, layout, stream, assumed)
    routing = stream.local / _sequence(layout) * (5 * shape.experts + 48 * shape.experts_per_token)
    return normed + routing + rows * (shape.hidden + 3 * shape.expert_ffn / layout.expert_tensor) * b


def _passing(shape: ModelShape, policy: PolicyConfig, stream: FullStream, assumed: Assumptions) -> float:
    """The largest need of one layer's backward pass beyond what was kept for it."""
    layout, b, d = policy.layout, width(policy), shape.head_dim
    heads, kv = _heads(shape, layout)
    residual = stream.local * shape.hidden * b
    if shape.experts:
        rows = _routed(shape, layout, stream, assumed)
        mlp = rows * (2 * shape.hidden + 2 * shape.expert_ffn / layout.expert_tensor) * b
        kernel = 0.0
    else:
        mlp = stream.local * 2 * shape.ffn / layout.tensor * b
        kernel = 2 * shape.ffn * shape.hidden / layout.tensor * b
    # Attention: float32 sums of the gradients; with CP the stream's keys and values, as gathered and in order.
    gathered = 2 * b + 4 if layout.context > 1 else 0
    attention = stream.local * heads * d * (4 + 2 * b) + stream.whole * 2 * kv * d * (4 + gathered)
    if assumed.flash:
        attention += _flash(shape, policy, stream)
    freed = _mlp(shape, layout, stream, b, assumed)
    return 2 * residual + max(mlp + kernel, attention - freed)


def _flash(shape: ModelShape, policy: PolicyConfig, stream: FullStream) -> float:
    """What a GPU's kernel takes in its backward pass, besides gradients in float32: theirs in half precision; its own
    sums of the queries', in float32, and two numbers a row; of the keys' and values', where several queries' heads
    share one, sums in float32 (version 3, `hopper/flash_api.cpp`) or gradients by every query's head (version 2,
    `csrc/flash_attn/flash_api.cpp`)."""
    heads, kv = _heads(shape, policy.layout)
    b, d = width(policy), shape.head_dim
    keys = 2 * kv * b
    if heads > kv:
        keys += 2 * heads * b if policy.attention == "fa2" else 2 * kv * 4
    return stream.local * heads * (4 * d + 8) + stream.whole * d * keys
