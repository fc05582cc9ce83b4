"""Export and transfer of a whole model to the in-process engine, in units of one plain copy of its bytes.

    python -m benchmarks.resync [--rounds 5] [--json]

The learner's weights are gathered, cut into Hugging Face tensors and loaded in place. A plain copy writes the
same bytes once, into memory that is there already. Both are measured in turns, in one process.

A CPU engine lays matrices out for its kernels (oneDNN) when it first multiplies by them after a resync: `packing`,
a part of `sampling`. On CUDA there is none. The same is measured with an engine that never packs, and what that
costs it in sampling. After that the same model goes from two ranks to two servers (`resync_ranks`).
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import save_model
from benchmarks.resync_ranks import measure_servers, units
from spell_megatron.config import LayoutConfig, PolicyConfig, RolloutConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.rollout import backend
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
    """Median seconds of a plain copy, of the export alone, of export and transfer to either engine, of sampling."""
    save_model(folder / "model", **SHAPE)
    learner = Learner(
        PolicyConfig(dtype="float32"),
        folder / "model",
        start_world(LayoutConfig(), seed=0, timeout_seconds=600),
    )
    try:
        packed, unpacked = (_engine(learner, folder, rounds, packs=packs) for packs in (True, False))
        tensors = [tensor for _, tensor in learner.weights()]
    finally:
        stop_world()
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "seconds": {"packed": packed, "unpacked": unpacked},
        "copies": packed["resync"] / packed["copy"],
        "copies_export": packed["export"] / packed["copy"],
        "copies_packing": packed["packing"] / packed["copy"],
        "copies_with_packing": (packed["resync"] + packed["packing"]) / packed["copy"],
        "copies_unpacked": unpacked["resync"] / unpacked["copy"],
        "sampling_unpacked": unpacked["sampling"] / packed["sampling"],
    }


def _engine(learner: Learner, folder: Path, rounds: int, *, packs: bool) -> dict[str, float]:
    """Medians over rounds in which each kind of work has its turn; the first one warms up."""
    settings = RolloutConfig(dtype="float32", max_model_len=512, max_num_seqs=64, kv_cache_mib=256)
    backend.prepare(folder / "vllm")
    with _packing(packs):
        engine = InProcessEngine(folder / "model", settings, scratch=folder / "vllm", stop=())
    copy, export = units(learner)

    def resync() -> None:
        engine.update_weights(learner.weights(), engine.version + 1)

    def sampling() -> None:
        asyncio.run(_sample(engine))

    seconds: dict[str, list[float]] = {}
    try:
        for _ in range(rounds + 1):
            with _packing(packs) as spent:
                for work in (copy, export, resync, sampling):
                    seconds.setdefault(work.__name__, []).append(_timed(work))
            seconds.setdefault("packing", []).append(sum(spent))
    finally:
        engine.close()
    return {name: median(times[1:]) for name, times in seconds.items()}


@contextmanager
def _packing(packs: bool) -> Iterator[list[float]]:
    """vLLM packs where it finds oneDNN; the seconds that every matrix takes."""
    from vllm import _custom_ops

    found, pack = _custom_ops._supports_onednn, _custom_ops.create_onednn_mm
    spent: list[float] = []

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        handler = pack(*args)
        spent.append(time.perf_counter() - start)
        return handler

    _custom_ops._supports_onednn, _custom_ops.create_onednn_mm = packs, timed
    try:
        yield spent
    finally:
        _custom_ops._supports_onednn, _custom_ops.create_onednn_mm = found, pack


async def _sample(engine: InProcessEngine) -> None:
    """32 completions of 8 tokens."""
    await engine.generate(range(64), seeds=range(32), max_tokens=8, temperature=1.0, top_p=1.0)


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
        result["servers"] = measure_servers(Path(folder) / "model", Path(folder), rounds)
    table = Table("what", "packed", "copies", "unpacked", "copies")
    packed, unpacked = result["seconds"].values()
    for name in packed:
        pairs = ((times[name], times[name] / times["copy"]) for times in (packed, unpacked))
        table.add_row(name, *(cell for s, copies in pairs for cell in (f"{s:.3f} s", f"{copies:.2f}")))
    console = Console()
    console.print(f"{result['parameters'] / 1e6:.1f} M parameters, {result['bytes'] / 1e6:.0f} MB")
    console.print(table)
    servers = Table(*result["servers"][0], title="two ranks, two servers (seconds)")
    for row in result["servers"]:
        servers.add_row(*(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()))
    console.print(servers)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
