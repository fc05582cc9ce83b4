"""What the measurements of the policy share: a small model, a group of tokens, ranks, peak memory, the table."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from spell_megatron.base.rendezvous import LOOPBACK, listening, serve
from spell_megatron.types import Group, Sample

Value = TypeVar("Value")

warnings.filterwarnings("ignore")  # megatron-core announces at length what is not installed
transformers.logging.disable_progress_bar()

SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 131072,
}
"""5.2 million parameters."""
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 320,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""Added to `SMALL`: eight experts of half its width, two to a token."""


def save_model(folder: Path, **shape: Any) -> Path:
    """Write a random Qwen3 (with `num_experts`, Qwen3-MoE) of `SMALL` with `shape`'s changes."""
    shape = {**SMALL, **shape}
    torch.manual_seed(0)
    if "num_experts" in shape:
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    model.save_pretrained(folder)
    return folder


def random_group(prompt: int, replies: int, reply: int, vocab: int = SMALL["vocab_size"]) -> Group:
    """A prompt of `prompt` tokens with `replies` responses of `reply` tokens, always the same."""
    draw = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(vocab, (n,), generator=draw).tolist()

    weights = torch.randn(replies, generator=draw).tolist()
    return Group(tokens(prompt), tuple(Sample(tokens(reply), [w] * reply) for w in weights))


def apart(work: Callable[..., Value], *args: Any) -> Value:
    """`work(*args)` in a fresh process, whose memory is free when this returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def run_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(*args)` in `size` fresh processes that find each other; what each returned.

    The machine's cores are shared out. Raises `BrokenProcessPool` where one was killed (for memory, say).
    """
    store = serve(listening(LOOPBACK), seconds=600.0)
    with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_as_rank, rank, size, store.port, work, args) for rank in range(size)]
        return [rank.result() for rank in ranks]


def _as_rank(rank: int, size: int, port: int, work: Callable[..., Any], args: Sequence[Any]) -> Any:
    # The last one says that rank 0 does not serve the store: the parent does.
    meeting = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(meeting, RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    return work(*args)


def median_seconds(work: Callable[[], Any], rounds: int) -> float:
    """After a first time that is not counted."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def show(title: str, cases: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """A table with a row for each case; with `as_json` also `{"cases": …}` as the last line of the output."""
    table = Table(*cases[0], title=title)
    for case in cases:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in case.values()))
    Console(stderr=True, width=160).print(table)
    if as_json:
        sys.stdout.write(json.dumps({"cases": list(cases)}) + "\n")
