"""Tokens a second of one training step: ours over plain Hugging Face transformers on the same work.

    python -m benchmarks.trainer [--json]

The same model, sequences, threads and optimizer, in turns, in one process. Sequences are of equal length and the
head runs on every token on both sides, so that neither padding, packing nor shared prompts make the difference.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from spell_megatron.config import Layout, Policy
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.types import Group, Sample, TrainBatch

SEQUENCES, LENGTH, LR = 4, 1024, 1e-4
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 320,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def measure(kind: str, folder: Path, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    if kind == "moe":
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    model.save_pretrained(folder)
    learner = Learner(
        Policy(dtype="float32", stream_tokens=SEQUENCES * LENGTH),
        folder,
        start_world(Layout(), seed=0, timeout_seconds=600),
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR)
    ids = torch.randint(SHAPE["vocab_size"], (SEQUENCES, LENGTH))
    batch = TrainBatch(
        tuple(Group(row[:1], (Sample(row[1:], [1.0] * (LENGTH - 1)),)) for row in ids.tolist())
    )

    def hugging_face() -> None:
        optimizer.zero_grad()
        logits = theirs(ids[:, :-1]).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()

    def ours() -> None:
        learner.update(batch)

    seconds: dict[str, list[float]] = {"hf": [], "ours": []}
    for round_ in range(rounds + 1):
        for name, step in (("hf", hugging_face), ("ours", ours)):
            began = time.perf_counter()
            step()
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    stop_world()
    tokens = SEQUENCES * LENGTH
    speed = {name: tokens / median(values) for name, values in seconds.items()}
    return {
        "model": kind,
        "ratio": speed["ours"] / speed["hf"],
        **{f"{n}_tokens_per_second": s for n, s in speed.items()},
    }


def main(rounds: int = 5, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Print the table; with --json the same as the last line."""
    cases = []
    for kind in ("dense", "moe"):
        with tempfile.TemporaryDirectory() as scratch:
            cases.append(measure(kind, Path(scratch), rounds))
    table = Table(*cases[0], title="training step: ours over Hugging Face")
    for row in cases:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(stderr=True).print(table)
    if as_json:
        sys.stdout.write(json.dumps({"cases": cases}) + "\n")


if __name__ == "__main__":
    typer.run(main)
