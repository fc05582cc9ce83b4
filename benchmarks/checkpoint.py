"""What a checkpoint takes on each rank: host memory above training's, bytes of files, seconds.

    python -m benchmarks.checkpoint [--parameters 1e9] [--ranks 2] [--json]

Data-parallel ranks of a bfloat16 model with a distributed optimizer, on this machine. A rank's state is what it saves:
its share of weights, master weights and moments. A save in the background is measured until its file is written, twice:
the first one makes the memory that it copies to. Two ranks need 38 bytes a parameter and something: weights and
gradients on each (2 + 4), the optimizer's state and the copy shared between them (12 + 14); and 28 on the disk.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.common import SMALL, random_group, run_ranks, show
from benchmarks.memory import PeakMemory
from spell_megatron.config import LayoutConfig, OptimizerConfig, PolicyConfig
from spell_megatron.policy.checkpoint import Checkpoints, load_learner
from spell_megatron.policy.layout import check_layout
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.tools.plan.parameters import stage_parameters
from spell_megatron.tools.plan.saving import read_bytes, saved_bytes
from spell_megatron.types import TrainBatch

WIDTH = 1024
LAYER = 16 * WIDTH**2
"""Parameters of a layer, roughly."""


def measure(folder: Path, scratch: Path) -> list[dict[str, Any]]:
    """This rank's rows: two saves and a load."""
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=600)
    policy = PolicyConfig(dtype="bfloat16", optimizer=OptimizerConfig(distributed=True, overlap=True))
    learner = Learner(policy, folder, world)
    learner.update(TrainBatch((random_group(20, 2, 5),) * world.size))
    [part] = stage_parameters(learner.shape, policy.layout)
    shape = check_layout(policy.layout, learner.shape, world.size)
    state, wanted = saved_bytes(part, policy, shape), read_bytes(part, policy, shape)
    checkpoints, rows = Checkpoints(scratch / "checkpoints", background=True), []

    def row(work: str, peak: int, moved: int, planned: int, blocked: float, seconds: float) -> None:
        rows.append(
            {
                "rank": world.rank,
                "work": work,
                "state MB": state / 1e6,
                "peak / state": peak / state,
                "moved / planned": moved / planned,
                "blocked s": blocked,
                "seconds": seconds,
            }
        )

    for step, work in ((1, "save"), (2, "save again")):
        dist.barrier()
        with PeakMemory() as memory:
            began = time.perf_counter()
            checkpoints.save(step, learner, {})
            blocked = time.perf_counter() - began
            checkpoints.wait()
        seconds = time.perf_counter() - began
        file = scratch / f"checkpoints/step-{step:05d}/learner/__{world.rank}_0.distcp"
        row(work, memory.bytes, file.stat().st_size, state, blocked, seconds)
    found = checkpoints.newest()
    assert found is not None
    with PeakMemory() as memory:
        began = time.perf_counter()
        read = load_learner(learner, found)
    seconds = time.perf_counter() - began
    row("load", memory.bytes, read, wanted, seconds, seconds)
    stop_world()
    return rows


def make(folder: Path, parameters: float) -> None:
    """Write a dense model of about so many parameters."""
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": max(1, round(parameters / LAYER)),
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": WIDTH // 16,
    }
    config = Qwen3Config(**{**SMALL, **shape})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def main(
    parameters: Annotated[float, typer.Option(help="Of the model, about.")] = 1e9,
    ranks: Annotated[int, typer.Option(min=1, help="That share it.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Measure saves and a load on data-parallel ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make(folder, parameters)
        found = run_ranks(ranks, measure, folder, Path(scratch))
    show("a checkpoint, by rank", [row for rows in found for row in rows], as_json)


if __name__ == "__main__":
    typer.run(main)
