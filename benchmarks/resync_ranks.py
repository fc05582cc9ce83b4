"""Resync from two ranks to two servers that share their devices, in units of one plain copy of the bytes per rank.

A part of `benchmarks.resync`. Every rank writes the model's bytes once into memory that is there already, both at the
same time: that is the unit. Export gathers the weights on both ranks and drops them. A resync is all that `train` waits
for: export, transfer, and what is said to the servers around it. Besides the time, the bytes that a rank writes in a
resync are counted, in the same unit; an engine writes them once more, into its own weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import run_ranks
from spell_megatron.config import LayoutConfig, PolicyConfig, RolloutConfig, ServersConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.rollout.engine import Engine
from spell_megatron.rollout.fleet import Fleet
from spell_megatron.rollout.follower import FollowerEngine

RANKS = 2
LAYOUTS = {"DP2": LayoutConfig(), "TP2": LayoutConfig(tensor=2, sequence=True)}
SETTINGS = RolloutConfig(
    dtype="float32",
    max_model_len=512,
    max_num_seqs=16,
    max_batched_tokens=512,
    kv_cache_mib=32,
    servers=ServersConfig(count=2, start_seconds=600),
)
Transfer = Literal["shm", "gloo"]


def measure_servers(model: Path, scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each transfer and layout."""
    transfers: tuple[Transfer, ...] = ("shm", "gloo")
    return [
        row for transfer in transfers for row in run_ranks(RANKS, _rank, model, scratch, transfer, rounds)[0]
    ]


def _rank(model: Path, scratch: Path, transfer: Transfer, rounds: int) -> list[dict[str, Any]]:
    """Rank 0's rows; the other one's are its own seconds of the same."""
    settings = replace(SETTINGS, servers=replace(SETTINGS.servers, transfer=transfer))
    engine: Engine | FollowerEngine | None = None
    rows = []
    try:
        for version, (name, layout) in enumerate(LAYOUTS.items()):
            world = start_world(layout, seed=0, timeout_seconds=600)
            if engine is None:
                logs, vllm = scratch / f"logs-{transfer}", scratch / "vllm"
                engine = (
                    Fleet(model, settings, scratch=vllm, logs=logs, stop=())
                    if world.is_main
                    else FollowerEngine(model, transfer, scratch=vllm)
                )
            learner = Learner(PolicyConfig(dtype="float32", layout=layout), model, world)
            seconds, written = _measured(learner, engine, version * (rounds + 2), rounds)
            copies = {f"{work} / copy": seconds[work] / seconds["copy"] for work in ("export", "resync")}
            rows.append(
                {"transfer": transfer, "layout": name, **seconds, **copies, "copies written": written}
            )
    finally:
        if engine is not None:
            engine.close()
        stop_world()
    return rows


def _measured(
    learner: Learner, engine: Engine | FollowerEngine, version: int, rounds: int
) -> tuple[dict[str, float], float]:
    """Medians over rounds in which each kind of work has its turn (the first one warms up), and what the rank that
    writes most in one more resync writes, in copies of the model."""
    copy, export = units(learner)

    def resync() -> None:
        nonlocal version
        version += 1
        engine.update_weights(learner.weights(), version)

    works: tuple[Callable[[], None], ...] = (copy, export, resync)
    seconds: dict[str, list[float]] = {work.__name__: [] for work in works}
    for _ in range(rounds + 1):
        for work in works:
            dist.barrier()
            began = time.perf_counter()
            work()
            dist.barrier()
            seconds[work.__name__].append(time.perf_counter() - began)
    with _Written() as written:
        resync()
    size = sum(tensor.nbytes for _, tensor in learner.weights())
    everyones: list[Any] = [None] * RANKS
    dist.all_gather_object(everyones, written.bytes / size)
    return {name: median(times[1:]) for name, times in seconds.items()}, max(everyones)


class _Written(TorchDispatchMode):
    """Counts the bytes of all results that are no views of what was there before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach"))):
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def units(learner: Learner) -> tuple[Callable[[], None], Callable[[], None]]:
    """The two kinds of work a resync is compared with: one plain copy of the bytes, and the export alone."""
    source = {name: tensor.clone() for name, tensor in learner.weights()}
    target = {name: torch.empty_like(tensor) for name, tensor in source.items()}

    def copy() -> None:
        for name, tensor in source.items():
            target[name].copy_(tensor)

    def export() -> None:
        for _ in learner.weights():
            pass

    return copy, export
