"""What one GPU makes of the policy: how exact it is, and how fast.

    python -m benchmarks.gpu precision                       # bfloat16 and float32 against transformers in float32
    python -m benchmarks.gpu attention                       # span attention against torch's SDPA
    python -m benchmarks.gpu layers --model Qwen3-30B-A3B-Instruct-2507:1   # one class of layers at a time
    python -m benchmarks.gpu steps --model Qwen3-4B:24 --model Qwen3-30B-A3B-Instruct-2507:3 --tokens 16384
    python -m benchmarks.gpu switches --model Qwen3-4B:8                    # steps, every switch on and off

Each takes `--json`. A model is one that the planner knows, or a folder with a config.json, with so many of its layers
and random weights; tokens are sampled as every recipe does it, from a nucleus. A step's operations are those of the
planner (`plan.workload`): recomputation is not counted, so that MFU is of what a step needs, not of what it does.
Beside each time stands the one that the planner expects of an H100. Without a GPU everything runs on the CPU, to see
that it does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import EXPERTS, SMALL, median_seconds, random_group, save_model, show
from benchmarks.device import LENGTHS, PEAK, G, device_name, random_model
from benchmarks.layers import layer_classes
from benchmarks.switches import BASE, NOT_HERE, settings, step, try_step
from spell_megatron.config import Dtype, LayoutConfig, PolicyConfig
from spell_megatron.policy.attention import attend
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.optimizer import main_gradient
from spell_megatron.policy.spans import plan_spans
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.types import Group, TrainBatch
from spell_megatron.weights.shape import model_shape

app = typer.Typer(help=__doc__, no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")]
Models = Annotated[list[str], typer.Option(help="NAME:LAYERS; repeatable.")]
Lengths = Annotated[list[int] | None, typer.Option(help="Of a stream: a prompt and 8 answers; repeatable.")]
Rounds = Annotated[int, typer.Option(min=1)]
Peak = Annotated[float, typer.Option(help="Operations a second that the GPU is sold with.")]


@app.command()
def precision(as_json: AsJson = False) -> None:
    """Loss, log-probs and gradients of small models; transformers in bfloat16 stands beside ours."""
    world, cases = start_world(LayoutConfig(), seed=0, timeout_seconds=600), []
    with tempfile.TemporaryDirectory() as scratch:
        for family, folder in families(Path(scratch)).items():
            for by, errors in errors_of(folder, world).items():
                cases.append({"model": family, "by": by, **errors})
    stop_world()
    show(f"against transformers in float32, on {device_name()}", cases, as_json)


def errors_of(folder: Path, world: World) -> dict[str, dict[str, float]]:
    """Errors of transformers in bfloat16, and of ours in both precisions with shared and with packed prompts."""
    batch = TrainBatch((random_group(400, G, 60), random_group(33, 2, 9)))
    truth = _transformers(folder, batch, torch.float32, world.device)
    theirs = _transformers(folder, batch, torch.bfloat16, world.device)
    errors = {"transformers, bfloat16": _apart(theirs, truth)}
    precisions: tuple[Dtype, ...] = ("bfloat16", "float32")
    for dtype in precisions:
        for shared in (True, False):
            policy = PolicyConfig(dtype=dtype, share_prompts=shared, stream_tokens=8192)
            ours = _ours(Learner(policy, folder, world), batch)
            errors[f"ours, {dtype}, {'shared' if shared else 'packed'}"] = _apart(ours, truth)
    return errors


def families(scratch: Path, **changes: Any) -> dict[str, Path]:
    """Write a small model of every family, with `changes` of its shape."""
    shape = {**SMALL, "hidden_size": 512, "head_dim": 64, **changes}
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in shape.items() if k != "head_dim"}))
    qwen2.save_pretrained(scratch / "qwen2.5")
    return {
        "qwen2.5": scratch / "qwen2.5",
        "qwen3": save_model(scratch / "qwen3", **shape),
        "qwen3, tied": save_model(scratch / "tied", **shape, tie_word_embeddings=True),
        "qwen3-moe": save_model(scratch / "moe", **shape, **EXPERTS),
    }


_Found = tuple[float, Tensor, dict[str, Tensor]]
"""Loss, log-probs of all response tokens, gradients by Hugging Face name."""


def _transformers(folder: Path, batch: TrainBatch, dtype: torch.dtype, device: torch.device) -> _Found:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    total, logprobs = torch.zeros((), device=device), []
    for group in batch.groups:
        for sample in group.samples:
            ids = torch.tensor([[*group.prompt, *sample.tokens]], device=device)
            logits = model(ids).logits[0, len(group.prompt) - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(-1, ids[0, len(group.prompt) :, None])[:, 0]
            total = total - (chosen * torch.tensor(sample.weights, device=device)).sum()
            logprobs.append(chosen.detach())
    (total / batch.response_tokens).backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()) / batch.response_tokens, torch.cat(logprobs), gradients


def _ours(learner: Learner, batch: TrainBatch) -> _Found:
    learner.gradients(batch)
    gradients = {name: tensor.clone() for name, tensor in learner.weights(main_gradient)}
    scores = [torch.from_numpy(x) for group in learner.score(batch).logprobs for x in group]
    weights = [w for group in batch.groups for sample in group.samples for w in sample.weights]
    logprobs = torch.cat(scores).to(learner.world.device)
    loss = -float((logprobs * torch.tensor(weights, device=logprobs.device)).mean())
    return loss, logprobs, gradients


def _apart(found: _Found, truth: _Found) -> dict[str, float]:
    """Expert gradients are left out: transformers keeps them in one tensor a layer."""
    names = found[2].keys() & truth[2].keys()
    gaps = (found[1] - truth[1]).abs()
    return {
        "loss": abs(found[0] - truth[0]) / abs(truth[0]),
        "log-probs, mean": float(gaps.mean()),
        "log-probs, max": float(gaps.max()),
        "gradients": max(
            float((found[2][n] - truth[2][n]).norm() / truth[2][n].norm().clamp(min=1e-12)) for n in names
        ),
    }


@app.command()
def attention(
    tokens: Annotated[list[int] | None, typer.Option(help="Of the prompt; repeatable.")] = None,
    heads: Annotated[int, typer.Option()] = 32,
    kv_heads: Annotated[int, typer.Option()] = 4,
    head_dim: Annotated[int, typer.Option()] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    as_json: AsJson = False,
) -> None:
    """Forward and backward of one layer's attention: a group that shares its prompt, against SDPA on each sequence."""
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=600)
    shape = (heads, kv_heads, head_dim)
    cases = [
        group_attention(prompt, max(prompt // 32, 1), shape, world, rounds) for prompt in tokens or LENGTHS
    ]
    stop_world()
    show(f"span attention over one group of {G}, on {device_name()}", cases, as_json)


def group_attention(
    prompt: int, reply: int, shape: tuple[int, int, int], world: World, rounds: int
) -> dict[str, Any]:
    """Attention of heads, key-value heads and width `shape` over one prompt and G answers of `reply` tokens."""
    heads, kv_heads, d = shape
    like: dict[str, Any] = {"device": world.device, "requires_grad": True}
    like["dtype"] = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    plan = plan_spans([(range(prompt), [range(reply)] * G)], device=world.device)
    q = torch.randn(prompt + G * reply, heads, d, **like)
    kv = torch.randn(prompt + G * reply, 2, kv_heads, d, **like)
    out: dict[str, Tensor] = {}

    def ours() -> None:
        out["ours"] = attend(q, kv, plan, None, d**-0.5)[prompt:]
        out["ours"].sum().backward()

    def sdpa() -> None:
        parts = []
        for first in range(prompt, prompt + G * reply, reply):
            a, b = (torch.cat((x[:prompt], x[first : first + reply])).transpose(0, -2) for x in (q, kv))
            # As a batch of one: of three dimensions every score would be written down.
            a, k, v = a[None], b[None, :, 0], b[None, :, 1]
            part = scaled_dot_product_attention(a, k, v, is_causal=True, enable_gqa=True)[0]
            parts.append(part[:, prompt:])
        out["sdpa"] = torch.cat(parts, 1).transpose(0, 1)
        out["sdpa"].sum().backward()

    seconds = {work.__name__: median_seconds(work, rounds) for work in (ours, sdpa)}
    pairs = prompt**2 / 2 + G * reply * (prompt + reply / 2)
    return {
        "P": prompt,
        "R": reply,
        "ms": seconds["ours"] * 1e3,
        "TFLOP/s": 3.5 * 4 * pairs * heads * d / seconds["ours"] / 1e12,
        "SDPA ms": seconds["sdpa"] * 1e3,
        "speed-up": seconds["sdpa"] / seconds["ours"],
        "largest difference": float((out["ours"].float() - out["sdpa"].float()).abs().max()),
    }


@app.command()
def layers(
    model: Models,
    tokens: Lengths = None,
    spec: Annotated[str, typer.Option(help="auto, torch or te.")] = "auto",
    rounds: Rounds = 3,
    peak: Peak = PEAK,
    as_json: AsJson = False,
) -> None:
    """Forward and backward of attention, of the MLP or the experts, and of the head, each alone."""
    policy, cases = _policy(spec=spec), list[dict[str, Any]]()
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=1800)
    for entry, length, folder in _models(model, tokens):
        for name, measured in layer_classes(
            policy, folder, shared_group(length, folder), world, rounds, peak
        ):
            cases.append({"model": entry, "tokens": length, "layer": name, **measured()})
    stop_world()
    show(f"one layer's classes, on {device_name()}", cases, as_json)


@app.command()
def steps(
    model: Models,
    tokens: Lengths = None,
    recompute: Annotated[str, typer.Option(help="none, all_but_attention or full.")] = "full",
    unshared: Annotated[bool, typer.Option(help="Also with the prompt repeated for every answer.")] = True,
    spec: Annotated[str, typer.Option(help="auto, torch or te.")] = "auto",
    rounds: Rounds = 3,
    peak: Peak = PEAK,
    as_json: AsJson = False,
) -> None:
    """A whole training step: forward, backward, clipping, AdamW. An unshared answer is a stream by itself."""
    cases: list[dict[str, Any]] = []
    for entry, length, folder in _models(model, tokens):
        group = shared_group(length, folder)
        for shared in (True, False) if unshared else (True,):
            streams = length if shared else length - (G - 1) * (length // 32)
            policy = _policy(stream_tokens=streams, share_prompts=shared, recompute=recompute, spec=spec)
            cases.append({"model": entry, "tokens": length, **step(policy, folder, group, rounds, peak)})
    show(f"training steps, recompute={recompute}, on {device_name()}", cases, as_json)


@app.command()
def switches(
    model: Models, tokens: Lengths = None, rounds: Rounds = 3, peak: Peak = PEAK, as_json: AsJson = False
) -> None:
    """Steps as recipes have them, and with every switch of the policy at its other values, one at a time."""
    cases, impossible = list[dict[str, Any]](), list[dict[str, Any]]()
    for entry, length, folder in _models(model, tokens):
        group = shared_group(length, folder)
        for name, policy, sampled in settings(_policy(stream_tokens=length)):
            found = try_step(policy, folder, group, rounds, peak, sampled)
            kind = impossible if NOT_HERE in found else cases
            kind.append({"model": entry, "tokens": length, "switch": name, **found})
    if impossible:
        show("what this machine cannot do", impossible, False)
    show(f"training steps, one switch at a time, on {device_name()}", cases, as_json)


def _policy(**changes: Any) -> PolicyConfig:
    return replace(BASE, **changes)


def _models(entries: list[str], tokens: list[int] | None) -> Iterator[tuple[str, int, Path]]:
    """NAME:LAYERS, a stream's tokens, the folder of a random model; for every pair."""
    for entry in entries:
        name, _, layers = entry.rpartition(":")
        with tempfile.TemporaryDirectory() as scratch:
            folder = random_model(name, int(layers), Path(scratch))
            yield from ((entry, length, folder) for length in tokens or LENGTHS)


def shared_group(length: int, folder: Path) -> Group:
    """A prompt and its answers, of a model's vocabulary; together a stream of so many tokens."""
    return random_group(length - G * (length // 32), G, length // 32, model_shape(folder).vocab)


if __name__ == "__main__":
    app()
