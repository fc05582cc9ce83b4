"""What the policy must agree with: plain Hugging Face transformers, one sequence at a time, in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from spell_megatron.types import Group, Sample, TrainBatch

SHAPES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (37, (5, 9, 12)),
    (50, (7, 8)),
    (61, (3, 20, 11, 1)),
    (23, (14, 6)),
    (1, (9, 4)),
    (40, (17,)),
    (90, (25, 30)),
    (12, (1,)),
)
"""`(prompt length, response lengths)`: uneven, with a group of one and responses of one token."""


def random_batch(
    vocab: int, seed: int = 0, shapes: tuple[tuple[int, tuple[int, ...]], ...] = SHAPES
) -> TrainBatch:
    draw = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(3, vocab) for _ in range(length)]

    return TrainBatch(
        tuple(
            Group(
                tokens(prompt),
                tuple(Sample(tokens(n), [draw.gauss(0, 1) for _ in range(n)]) for n in replies),
            )
            for prompt, replies in shapes
        )
    )


def with_experts(batch: TrainBatch, layers: int, experts: int, top_k: int, seed: int = 0) -> TrainBatch:
    """The batch as if an engine had chosen experts at random. As an engine's, they end before the last token."""
    draw = np.random.default_rng(seed)

    def choose(tokens: int) -> np.ndarray:
        return draw.random((tokens, layers, experts)).argsort(-1)[..., :top_k].astype(np.uint8)

    return TrainBatch(
        tuple(
            Group(
                group.prompt,
                tuple(replace(s, experts=choose(len(s.tokens) - 1)) for s in group.samples),
                choose(len(group.prompt)),
            )
            for group in batch.groups
        )
    )


@contextmanager
def forced(model: torch.nn.Module, group: Group, sample: Sample) -> Iterator[None]:
    """The model's routers choose what the batch says; weights are the softmax over all experts, cut and normalised."""

    def route(chosen: Tensor, gate: torch.nn.Module, _inputs: object, routed: tuple[Tensor, ...]) -> object:
        logits, _, own = routed
        chosen = torch.cat((chosen, own[len(chosen) :]))
        scores = logits.softmax(-1).gather(-1, chosen)
        return logits, scores / scores.sum(-1, keepdim=True) if gate.norm_topk_prob else scores, chosen

    with ExitStack() as stack:
        if group.experts is not None and sample.experts is not None:
            both = torch.from_numpy(np.concatenate((group.experts, sample.experts)).astype(np.int64))
            for number, layer in enumerate(model.model.layers):
                hook = layer.mlp.gate.register_forward_hook(partial(route, both[:, number]))
                stack.callback(hook.remove)
        yield


@dataclass(frozen=True)
class Reference:
    loss: float
    logprobs: list[list[np.ndarray]]
    entropy: list[list[np.ndarray]]
    gradients: dict[str, Tensor]


def reference(folder: Path, batch: TrainBatch, temperature: float = 1.0) -> Reference:
    """Loss, log-probs, entropies and gradients (by the names of the safetensors) of a weighted batch."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager"
    )
    total = torch.zeros((), dtype=torch.float64)
    logprobs, entropy = [], []
    for group in batch.groups:
        logprobs.append([])
        entropy.append([])
        for sample in group.samples:
            ids = torch.tensor([[*group.prompt, *sample.tokens]])
            with forced(model, group, sample):
                logits = model(ids).logits[0, len(group.prompt) - 1 : -1] / temperature
            log_p = torch.log_softmax(logits, -1)
            chosen = log_p.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0]
            total = total - (torch.tensor(sample.weights, dtype=torch.float64) * chosen).sum()
            logprobs[-1].append(chosen.detach().numpy())
            entropy[-1].append(-(log_p.exp() * log_p).sum(-1).detach().numpy())
    (total / batch.response_tokens).backward()
    weights = [w for group in batch.groups for sample in group.samples for w in sample.weights]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Reference(-float(np.mean(weights)), logprobs, entropy, _unfused(gradients))


def _unfused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts one by one, as model files have them; transformers keeps them in one tensor a layer."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                out[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                out[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                out[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            out[name] = tensor
    return out


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry of the reference."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
