"""One class of layers at a time, forward and backward, measured beside what the planner says of an H100."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import median_seconds
from benchmarks.device import ASSUMED, SAMPLED
from spell_megatron.config import PolicyConfig
from spell_megatron.policy.head import token_logprobs
from spell_megatron.policy.model import build_chunks
from spell_megatron.policy.spans import plan_spans
from spell_megatron.policy.world import World
from spell_megatron.tools.plan.workload import Work, batch_work, forward_work, group_lengths, head_backward
from spell_megatron.types import Group, TrainBatch
from spell_megatron.weights.shape import ModelShape, model_shape


def layer_classes(
    policy: PolicyConfig, folder: Path, group: Group, world: World, rounds: int, peak: float
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Attention with its projections, the MLP or experts with their router, and the head on the group's answers; what
    measures each. Weights are random."""
    shape = model_shape(folder)
    [model] = build_chunks(policy, shape, folder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        # Where products add to it themselves (policy.fusions.weight_gradients); data parallelism makes it otherwise.
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    plan = plan_spans([(group.prompt, [sample.tokens for sample in group.samples])], device=world.device)
    tokens = plan.ids.shape[1]
    like: dict[str, Any] = {
        "device": world.device,
        "dtype": getattr(torch, policy.dtype),
        "requires_grad": True,
    }
    hidden = torch.randn(tokens, 1, shape.hidden, **like)
    rows = torch.randn(plan.rows.numel(), shape.hidden, **like)
    angles = plan.positions.view(-1, 1).float() * model.inv_freq.to(world.device)
    angles = torch.cat((angles, angles), -1)[:, None, None, :]
    layer = model.decoder.layers[0]
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight

    def attention() -> Tensor:
        out: Tensor
        out, _ = layer.self_attention(
            hidden, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=plan
        )
        return out

    def mlp() -> Tensor:
        out: Tensor = layer.mlp(hidden)[0]
        return out

    def head() -> Tensor:
        group = model.pg_collection.tp
        options = {"sampled": SAMPLED, "chunk": policy.head_chunk, "tp_group": group}
        return torch.stack(token_logprobs(rows, weight, plan.targets, **options))

    backward = head_backward(TrainBatch((group,)).response_tokens, policy.head_chunk)
    for name, forward, work, passes in zip(
        ("attention", "experts" if shape.experts else "MLP", "head"),
        (attention, mlp, head),
        _works(shape, group),
        (3.0, 3.0, 1 + backward),
        strict=True,
    ):
        yield name, partial(_measured, forward, work, passes, rounds, peak)


def _works(shape: ModelShape, group: Group) -> tuple[Work, Work, Work]:
    """The work of one forward pass, by class."""
    batch = TrainBatch((group,))
    without_mlp = replace(shape, layers=1, vocab=0, ffn=0, experts=0, expert_ffn=0)
    attention = batch_work(without_mlp, group_lengths(batch), shared=True)
    layer = batch_work(replace(shape, layers=1, vocab=0), group_lengths(batch), shared=True)
    head = forward_work(replace(shape, layers=0), 0, 0, batch.response_tokens)
    return attention, Work(layer.dense - attention.dense, layer.expert, 0), head


def _measured(
    forward: Callable[[], Tensor], work: Work, passes: float, rounds: int, peak: float
) -> dict[str, Any]:
    """`passes` is what its products but for attention's take forward and backward, in forward passes."""
    seconds = median_seconds(lambda: forward().sum().backward(), rounds)
    done = 3 * work.total / seconds
    products = passes * (work.dense / ASSUMED.dense_rate + work.expert / ASSUMED.grouped_rate)
    attention = work.attention * (1 / ASSUMED.fa3_forward + 2.5 / ASSUMED.fa3_backward)
    return {
        "ms": seconds * 1e3,
        "H100 ms of products, predicted": (products + attention) * 1e3,
        "TFLOP/s": done / 1e12,
        "MFU": done / peak,
    }
