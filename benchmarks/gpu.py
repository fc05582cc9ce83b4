"""What one GPU makes of the policy: how exact it is, and how fast.

    python -m benchmarks.gpu precision                       # bfloat16 and float32 against transformers in float32
    python -m benchmarks.gpu attention                       # span attention against torch's SDPA
    python -m benchmarks.gpu steps --model Qwen3-4B:24 --model Qwen3-30B-A3B-Instruct-2507:3 --tokens 16384

Each takes `--json`. A model is one that the planner knows, or a folder with a config.json, with so many of its layers
and random weights. A step's operations are those of the planner (`plan.workload`): recomputation is not counted, so
that MFU is of what a step needs, not of what it does. Without a GPU everything runs on the CPU, to see that it does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import EXPERTS, SMALL, median_seconds, random_group, save_model, show
from spell_megatron.config import Dtype, Layout, Optimizer, Policy
from spell_megatron.plan.catalogue import architecture
from spell_megatron.plan.workload import batch_work, group_lengths
from spell_megatron.policy.attention import attend
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.spans import plan_spans
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.types import Group, TrainBatch
from spell_megatron.weights.shape import model_shape

G = 8
LENGTHS = (4096, 16_384, 32_768, 100_000)
PEAK = 989e12
"""bfloat16 operations a second that an H100 SXM is sold with."""
app = typer.Typer(help=__doc__, no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")]


@app.command()
def precision(as_json: AsJson = False) -> None:
    """Loss, log-probs and gradients of small models; transformers in bfloat16 stands beside ours."""
    world, cases = start_world(Layout(), seed=0, timeout_seconds=600), []
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
            policy = Policy(dtype=dtype, share_prompts=shared, stream_tokens=8192)
            ours = _ours(Learner(policy, folder, world), batch)
            errors[f"ours, {dtype}, {'shared' if shared else 'packed'}"] = _apart(ours, truth)
    return errors


def families(scratch: Path) -> dict[str, Path]:
    """Write a small model of every family."""
    shape = {**SMALL, "hidden_size": 512, "head_dim": 64}
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
    gradients = {name: tensor.clone() for name, tensor in learner.weights(lambda p: p.main_grad)}
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
    world = start_world(Layout(), seed=0, timeout_seconds=600)
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
            part = scaled_dot_product_attention(a, b[:, 0], b[:, 1], is_causal=True, enable_gqa=True)
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
def steps(
    model: Annotated[list[str], typer.Option(help="NAME:LAYERS; repeatable.")],
    tokens: Annotated[
        list[int] | None, typer.Option(help="Of a stream: a prompt and 8 answers; repeatable.")
    ] = None,
    recompute: Annotated[str, typer.Option(help="none, all_but_attention or full.")] = "full",
    unshared: Annotated[bool, typer.Option(help="Also with the prompt repeated for every answer.")] = True,
    spec: Annotated[str, typer.Option(help="auto, torch or te.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    peak: Annotated[float, typer.Option(help="Operations a second that the GPU is sold with.")] = PEAK,
    as_json: AsJson = False,
) -> None:
    """A whole training step: forward, backward, clipping, AdamW. An unshared answer is a stream by itself."""
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for entry in model:
            name, _, layers = entry.rpartition(":")
            folder = random_model(name, int(layers), Path(scratch) / str(len(cases)))
            vocab = model_shape(folder).vocab
            for length in tokens or LENGTHS:
                group = random_group(length - G * (length // 32), G, length // 32, vocab)
                for shared in (True, False) if unshared else (True,):
                    policy = Policy(
                        stream_tokens=length if shared else length - (G - 1) * (length // 32),
                        share_prompts=shared,
                        recompute=recompute,  # type: ignore[arg-type]
                        spec=spec,  # type: ignore[arg-type]
                        optimizer=Optimizer(distributed=True),
                    )
                    cases.append(
                        {"model": entry, "tokens": length, **step(policy, folder, group, rounds, peak)}
                    )
    show(f"training steps, recompute={recompute}, on {device_name()}", cases, as_json)


def step(policy: Policy, folder: Path, group: Group, rounds: int, peak: float) -> dict[str, Any]:
    """One update by a group, timed: its work, as a share of `peak` too, and the memory that it took."""
    world: World = start_world(Layout(), seed=0, timeout_seconds=1800)
    learner, batch = Learner(policy, folder, world), TrainBatch((group,))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(lambda: learner.update(batch), rounds)
    shape, shared = model_shape(folder), policy.share_prompts
    computed = len(group.prompt) * (1 if shared else G) + batch.response_tokens
    done = 3 * batch_work(shape, group_lengths(batch), shared=shared).total / seconds
    stop_world()
    return {
        "prompt": "shared" if shared else "repeated",
        "seconds": seconds,
        "tokens/s": computed / seconds,
        "answers' tokens/s": batch.response_tokens / seconds,
        "TFLOP/s": done / 1e12,
        "MFU": done / peak,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }


def random_model(name: str, layers: int, folder: Path) -> Path:
    """Write so many layers of a model that the planner knows, with random weights in bfloat16."""
    config = AutoConfig.from_pretrained(architecture(name), num_hidden_layers=layers)
    if "layer_types" in config.to_dict():
        config.layer_types = config.layer_types[:layers]
    with torch.device(_device_type()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Of the device that everything here runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


if __name__ == "__main__":
    app()
