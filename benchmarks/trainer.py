"""Tokens a second of one training step: ours over plain Hugging Face transformers on the same work.

    python -m benchmarks.trainer [--json]

The same model, sequences, threads and optimizer, in turns, in one process, the whole batch at once. Sequences are of
equal length and the head runs on every token on both sides, so that neither padding, packing nor shared prompts
make the difference.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.common import EXPERTS, SMALL, save_model, show
from spell_megatron.config import LayoutConfig, OptimizerConfig, PolicyConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.types import Group, Sample, TrainBatch

SEQUENCES, LENGTH, LR = 4, 1024, 1e-4


def measure(name: str, shape: dict[str, Any], folder: Path, rounds: int) -> dict[str, Any]:
    save_model(folder, **shape)
    whole = SEQUENCES * LENGTH
    policy = PolicyConfig(
        dtype="float32", stream_tokens=whole, head_chunk=whole, optimizer=OptimizerConfig(lr=LR)
    )
    learner = Learner(policy, folder, start_world(LayoutConfig(), seed=0, timeout_seconds=600))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR)
    ids = torch.randint(SMALL["vocab_size"], (SEQUENCES, LENGTH))
    ones = [1.0] * (LENGTH - 1)
    batch = TrainBatch(tuple(Group(row[:1], (Sample(row[1:], ones),)) for row in ids.tolist()))

    def hugging_face() -> None:
        optimizer.zero_grad()
        logits = theirs(ids[:, :-1]).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()

    def ours() -> None:
        learner.update(batch)

    seconds: dict[str, list[float]] = {"hf": [], "ours": []}
    for _ in range(rounds):
        for who, step in (("hf", hugging_face), ("ours", ours)):
            began = time.perf_counter()
            step()
            seconds[who].append(time.perf_counter() - began)
    stop_world()
    speed = {who: whole / min(times) for who, times in seconds.items()}
    rates = {f"{who}_tokens_per_second": value for who, value in speed.items()}
    return {"model": name, "ratio": speed["ours"] / speed["hf"], **rates}


def main(
    rounds: Annotated[int, typer.Option(help="The best of so many is taken, of both.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Measure both kinds of model and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        cases = [
            measure(name, shape, Path(scratch) / name, rounds)
            for name, shape in (("dense", {}), ("moe", EXPERTS))
        ]
    show("training step: ours over Hugging Face", cases, as_json)


if __name__ == "__main__":
    typer.run(main)
