"""Memory and time of one long document, forward and backward, split over context-parallel ranks.

    python -m benchmarks.context [--tokens 100000] [--cp 4] [--recompute full] [--json]

A group of eight responses fills the stream of `tokens`. `peak_bytes` is the most that the tensors of the busiest
rank take during the pass, above model, gradients and all that is made once: activations and what passes through.
`over_ideal` is that peak * CP over the peak of CP 1. `resident_bytes` is what the process grows by, with the
allocator's gaps and gloo's buffers. A case has passed where its loss is that of CP 1.

Each layer's keys and values are gathered whole on every rank, in the forward pass and again in the backward
pass, and are freed before the next layer's: that part alone does not shrink with CP, and its share falls with the
number of layers. Here there are four, and keys and values are half as wide as the hidden state, as in Qwen3-30B-A3B.
"""

from __future__ import annotations

import math
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import random_group, run_ranks, save_model, show
from benchmarks.memory import LiveBytes, PeakMemory
from spell_megatron.config import LayoutConfig, PolicyConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.types import TrainBatch

REPLIES, REPLY = 8, 64
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def run(folder: Path, tokens: int, cp: int, recompute: Any) -> dict[str, float]:
    """Body of one rank: bytes, seconds and the loss."""
    layout = LayoutConfig(context=cp)
    policy = PolicyConfig(layout=layout, dtype="float32", stream_tokens=tokens, recompute=recompute)
    learner = Learner(policy, folder, start_world(layout, seed=0, timeout_seconds=1800))
    learner.gradients(TrainBatch((random_group(64, REPLIES, 8),)))  # what is made only once is there
    batch = TrainBatch((random_group(tokens - REPLIES * REPLY, REPLIES, REPLY),))
    with PeakMemory() as resident, LiveBytes() as tensors:
        began = time.perf_counter()
        loss = learner.gradients(batch)
        seconds = time.perf_counter() - began
    stop_world()
    return {"bytes": tensors.peak, "resident": resident.bytes, "seconds": seconds, "loss": loss}


def measure(folder: Path, tokens: int, sizes: list[int], recompute: str) -> list[dict[str, Any]]:
    """One document length, every number of ranks."""
    cases: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    for cp in sizes:
        case: dict[str, Any] = {"tokens": tokens, "cp": cp, "passed": False}
        cases.append(
            {**case, "peak_bytes": None, "seconds": None, "over_ideal": None, "resident_bytes": None}
        )
        try:
            ranks = run_ranks(cp, run, folder, tokens, cp, recompute)
        except BrokenProcessPool:  # killed for its memory
            continue
        peak = max(rank["bytes"] for rank in ranks)
        first = first or {"loss": ranks[0]["loss"], "work": peak * cp}
        cases[-1] = {
            **case,
            "passed": all(math.isclose(rank["loss"], first["loss"], rel_tol=1e-5) for rank in ranks),
            "peak_bytes": peak,
            "seconds": max(rank["seconds"] for rank in ranks),
            "over_ideal": peak * cp / first["work"],
            "resident_bytes": max(rank["resident"] for rank in ranks),
        }
    return cases


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Length of the stream; repeatable.")] = None,
    cp: Annotated[list[int] | None, typer.Option(help="Context-parallel ranks; repeatable.")] = None,
    recompute: Annotated[str, typer.Option(help="none, all_but_attention or full.")] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Measure every length with every number of ranks and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_model(Path(scratch) / "model", **SHAPE)
        cases = [
            case
            for length in tokens or [16_384, 32_768, 100_000]
            for case in measure(folder, length, cp or [1, 2, 4], recompute)
        ]
    show("one long document over context-parallel ranks", cases, as_json)


if __name__ == "__main__":
    typer.run(main)
