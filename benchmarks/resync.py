"""Export and transfer of a whole model to the in-process engine, in units of one plain copy of its bytes.

    python -m benchmarks.resync [--rounds 5] [--json]

The learner's weights are gathered, cut into Hugging Face tensors, loaded and packed by vLLM. A plain copy
writes the same bytes once, into memory that is there already. Both are measured in turns, in one process.

`copies_packing` is the part of a resync that vLLM spends in laying matrices out for its CPU kernels (oneDNN), seen
by torch's profiler in one more resync: no way of bringing the weights can avoid it, and on CUDA there is none.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import save_model
from spell_megatron.config import Layout, Policy, Rollout
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.rollout.inprocess import InProcessEngine

SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": None,
}
"""100.7 million parameters."""


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Median seconds of a plain copy, of the export alone, of export and transfer; what of these is packing."""
    save_model(folder / "model", **SHAPE)
    world = start_world(Layout(), seed=0, timeout_seconds=600)
    learner = Learner(Policy(dtype="float32"), folder / "model", world)
    settings = Rollout(dtype="float32", max_model_len=512, max_num_seqs=8, kv_cache_mib=64)
    engine = InProcessEngine(folder / "model", settings, scratch=folder / "vllm")
    source = dict(learner.weights())
    target = {name: torch.empty_like(tensor) for name, tensor in source.items()}

    def copy() -> None:
        for name, tensor in source.items():
            target[name].copy_(tensor)

    def export() -> None:
        for _ in learner.weights():
            pass

    def resync() -> None:
        engine.update_weights(learner.weights(), engine.version + 1)

    seconds: dict[str, list[float]] = {"copy": [], "export": [], "resync": []}
    try:
        for _ in range(rounds + 1):
            for name, work in (("copy", copy), ("export", export), ("resync", resync)):
                seconds[name].append(_timed(work))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            resync()
    finally:
        engine.close()
        stop_world()
    medians = {name: median(times[1:]) for name, times in seconds.items()}  # the first round warms up
    events = profiler.key_averages()
    medians["packing"] = sum(event.self_cpu_time_total for event in events if "dnn" in event.key) / 1e6
    size = sum(tensor.nbytes for tensor in source.values())
    return {
        "parameters": sum(tensor.numel() for tensor in source.values()),
        "bytes": size,
        "seconds": medians,
        "copies": medians["resync"] / medians["copy"],
        "copies_export": medians["export"] / medians["copy"],
        "copies_packing": medians["packing"] / medians["copy"],
    }


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), rounds)
    table = Table("what", "seconds", "copies")
    for name, seconds in result["seconds"].items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / result['seconds']['copy']:.2f}")
    console = Console()
    console.print(f"{result['parameters'] / 1e6:.1f} M parameters, {result['bytes'] / 1e6:.0f} MB")
    console.print(table)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
