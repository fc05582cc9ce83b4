"""Forward and backward of one group: its prompt computed once, against once for every answer.

    python -m benchmarks.shared_prompt [--case 4096,256] [--json]

The unshared arrangement is the best there is: one sequence a microbatch, gradients accumulated; its peak is
that of one sequence. `packed` lays all sequences in one stream. Every arrangement runs in a process of its own,
so that its peak memory is its own; `ideal` is the ratio of tokens, G (P + R) / (P + G R). The first round also gets
memory from the system, which for one long stream takes longer than for many short ones.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common import random_group, run_ranks, save_model, show
from benchmarks.memory import PeakMemory
from spell_megatron.config import LayoutConfig, PolicyConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.optimizer import main_gradient
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.types import TrainBatch

G = 8
PACKED_TOKENS, FEW_LAYERS = 50_000, 2
"""Larger groups are packed, and shared, for a model of so few layers: more takes more memory than a laptop has."""


def run(folder: Path, prompt: int, reply: int, budget: int, share: bool, rounds: int) -> dict[str, Any]:
    """Body of one process: best seconds, bytes of the peak above the model's, and the gradients."""
    policy = PolicyConfig(dtype="float32", stream_tokens=budget, share_prompts=share)
    learner = Learner(policy, folder, start_world(LayoutConfig(), seed=0, timeout_seconds=3600))
    learner.gradients(TrainBatch((random_group(64, G, 8),)))  # what is made only once is there
    batch, seconds = TrainBatch((random_group(prompt, G, reply),)), []
    with PeakMemory() as peak:
        for _ in range(rounds):
            began = time.perf_counter()
            learner.gradients(batch)
            seconds.append(time.perf_counter() - began)
    gradients = {name: tensor.numpy().copy() for name, tensor in learner.weights(main_gradient)}
    stop_world()
    return {"seconds": min(seconds), "bytes": peak.bytes, "gradients": gradients}


def measure(folder: Path, prompt: int, reply: int, rounds: int) -> dict[str, Any]:
    sequence, stream, whole = prompt + reply, prompt + G * reply, G * (prompt + reply)
    [shared] = run_ranks(1, run, folder / "whole", prompt, reply, stream, True, rounds)
    [single] = run_ranks(1, run, folder / "whole", prompt, reply, sequence, False, rounds)
    fits = whole <= PACKED_TOKENS
    model = folder / ("whole" if fits else "thin")
    [packed] = run_ranks(1, run, model, prompt, reply, whole, False, 1)
    [beside] = [shared] if fits else run_ranks(1, run, model, prompt, reply, stream, True, 1)
    gaps = [
        float(np.abs(shared["gradients"][name] - g).max() / np.abs(g).max())
        for name, g in single["gradients"].items()
    ]
    ideal, speedup = whole / (prompt + G * reply), single["seconds"] / shared["seconds"]
    return {
        "G": G,
        "P": prompt,
        "R": reply,
        "ideal": ideal,
        "speedup": speedup,
        "efficiency": speedup / ideal,
        "peak_memory_ratio": shared["bytes"] / single["bytes"],
        "peak_memory_over_packed": beside["bytes"] / packed["bytes"],
        "max_relative_gradient_difference": max(gaps),
        "seconds": shared["seconds"],
        "peak_bytes": shared["bytes"],
    }


def main(
    case: Annotated[list[str] | None, typer.Option(help="P,R; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="The best of so many is taken.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Measure every case and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_model(folder / "whole")
        save_model(folder / "thin", num_hidden_layers=FEW_LAYERS)
        sizes = [tuple(map(int, entry.split(","))) for entry in case or ["4096,256", "16384,512"]]
        cases = [measure(folder, prompt, reply, rounds) for prompt, reply in sizes]
    show("shared prompts: speed-up and memory against unshared ones", cases, as_json)


if __name__ == "__main__":
    typer.run(main)
