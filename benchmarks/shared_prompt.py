"""Forward and backward of one group: its prompt computed once, against once for every answer.

    python -m benchmarks.shared_prompt [--case 4096 256] [--json]

The unshared arrangement is the best there is: one sequence a microbatch, gradients accumulated. `packed` lays
all sequences in one stream. Every arrangement runs in a process of its own, so that its peak memory is its own;
`ideal` is the ratio of tokens, G (P + R) / (P + G R).
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from spell_megatron.config import Layout, Policy
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.types import Group, Sample, TrainBatch

G = 8
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 32768,
}
"""5.2 million parameters."""
ARRANGEMENTS = ("shared", "one at a time", "packed", "one sequence")


def batch(prompt: int, reply: int) -> TrainBatch:
    draw = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(SHAPE["vocab_size"], (n,), generator=draw).tolist()

    weights = torch.randn(G, generator=draw).tolist()
    return TrainBatch((Group(tokens(prompt), tuple(Sample(tokens(reply), [w] * reply) for w in weights)),))


def run(folder: Path, arrangement: str, prompt: int, reply: int, rounds: int, out: Path) -> None:
    """Body of one process: seconds, peak memory in bytes above the model's, and the gradients."""
    group = batch(prompt, reply).groups[0]
    budget = G * (prompt + reply) if arrangement == "packed" else prompt + G * reply
    if arrangement == "one at a time":
        budget = prompt + reply
    if arrangement == "one sequence":
        group = Group(group.prompt, group.samples[:1])
    policy = Policy(dtype="float32", stream_tokens=budget, share_prompts=arrangement == "shared")
    learner = Learner(policy, folder, start_world(Layout(), seed=0, timeout_seconds=3600))
    base, seconds = _rss(), []
    for _ in range(rounds):
        began = time.perf_counter()
        learner.gradients(TrainBatch((group,)))
        seconds.append(time.perf_counter() - began)
    gradients = {name: tensor.clone() for name, tensor in learner.weights(lambda p: p.main_grad)}
    torch.save({"seconds": min(seconds), "bytes": _rss() - base, "gradients": gradients}, out)
    stop_world()


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: Path, prompt: int, reply: int, rounds: int) -> dict[str, Any]:
    results = {}
    for arrangement in ARRANGEMENTS:
        if arrangement == "packed" and G * (prompt + reply) > 50_000:
            continue  # more memory than most machines have
        out = folder / "result.pt"
        process = multiprocessing.get_context("spawn").Process(
            target=run, args=(folder / "model", arrangement, prompt, reply, rounds, out)
        )
        process.start()
        process.join()
        results[arrangement] = torch.load(out, weights_only=True)
    shared, single, one = (results[name] for name in ("shared", "one at a time", "one sequence"))
    gaps = [
        float((shared["gradients"][n] - g).abs().max() / g.abs().max())
        for n, g in single["gradients"].items()
    ]
    ideal, speedup = G * (prompt + reply) / (prompt + G * reply), single["seconds"] / shared["seconds"]
    return {
        "G": G,
        "P": prompt,
        "R": reply,
        "ideal": ideal,
        "speedup": speedup,
        "efficiency": speedup / ideal,
        "peak_memory_ratio": shared["bytes"] / one["bytes"],
        "peak_memory_over_packed": shared["bytes"] / results["packed"]["bytes"]
        if "packed" in results
        else None,
        "max_relative_gradient_difference": max(gaps),
    }


def main(
    case: Annotated[list[str] | None, typer.Option(help="P,R; repeatable.")] = None,
    rounds: int = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print the table; with --json the same as the last line."""
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(Path(scratch) / "model")
        for entry in case or ["4096,256", "16384,512"]:
            prompt, reply = map(int, entry.split(","))
            cases.append(measure(Path(scratch), prompt, reply, rounds))
    table = Table(*cases[0], title="shared prompts: speed-up and memory against unshared ones")
    for row in cases:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(stderr=True, width=160).print(table)
    if as_json:
        sys.stdout.write(json.dumps({"cases": cases}) + "\n")


if __name__ == "__main__":
    typer.run(main)
