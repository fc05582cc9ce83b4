"""Tokens a second of one training step: ours over plain Hugging Face transformers on the same work.

    python -m benchmarks.trainer [--json]

The same model, sequences, threads and optimizer, in one process, the whole batch at once. Sequences are of equal length
and the head runs on every token on both sides, so that neither padding, packing nor shared prompts make the difference.
Steps go in pairs, either side first in turns; the ratio is the median over the pairs, so that neither a machine that
slows down nor one slow step counts, and beside it stand its quartiles.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
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


def measure(name: str, shape: dict[str, Any], folder: Path, pairs: int) -> dict[str, Any]:
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

    steps = [("hf", hugging_face), ("ours", ours)]
    taken: list[dict[str, float]] = []
    for _ in range(1 + pairs):
        taken.append({who: _seconds(step) for who, step in steps})
        steps.reverse()
    stop_world()
    del taken[0]  # the first steps allocate
    speed = {f"{who}_tokens_per_second": whole / median(pair[who] for pair in taken) for who, _ in steps}
    ratios = [pair["hf"] / pair["ours"] for pair in taken]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {
        "model": name,
        "ratio": middle,
        "quartiles": f"{low:.2f}–{high:.2f}",
        **dict(sorted(speed.items())),
    }


def _seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of steps, after one that does not count.", min=2)] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Measure both kinds of model and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        cases = [
            measure(name, shape, Path(scratch) / name, pairs)
            for name, shape in (("dense", {}), ("moe", EXPERTS))
        ]
    show("training step: ours over Hugging Face", cases, as_json)


if __name__ == "__main__":
    typer.run(main)
