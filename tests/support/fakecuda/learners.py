"""Learners on the device that is not there: `python learners.py LIBRARY SITE [NAME …]` prints what each did, as JSON.

Those of Transformer Engine's layers where SITE is a folder with its Python, and else those of plain torch's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])  # before torch


@dataclass(frozen=True)
class Case:
    """A learner on one rank of `layout`, which builds, updates, scores, exports its weights and leaves the device."""

    kind: str = "qwen3"
    layout: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    rank: int = 0
    te: bool = False
    """Whether layers are Transformer Engine's."""
    plant: str = ""
    """A fault that is put in, as `plants.py` knows it."""

    @property
    def world(self) -> int:
        size = {"tensor": 1, "pipeline": 1, "context": 1, "expert": 1} | self.layout
        return max(2, size["tensor"] * size["pipeline"] * size["context"], size["expert"] * size["pipeline"])


SP = {"tensor": 2, "sequence": True}
FULL, KEPT = {"recompute": "full"}, {"recompute": "all_but_attention"}
CASES = {
    "dense": Case(),
    "dense tp2 cp2": Case("qwen2", {**SP, "context": 2}, FULL),
    "dense pp2, first stage": Case("qwen3_tied", {"pipeline": 2}),
    "dense pp2, last stage": Case("qwen3_tied", {"pipeline": 2}, FULL, rank=1),
    "dense, offloaded": Case(optimizer={"cpu_offload": True}),
    "experts": Case("moe"),
    "experts tp2 ep2": Case("moe", {**SP, "expert": 2}, FULL),
    "experts cp2 ep2": Case("moe", {"context": 2, "expert": 2}, KEPT),
    "experts, a layer offloaded": Case("moe", policy={"offload_layers": 1}),
    "te dense": Case(te=True),
    "te dense tp2 cp2": Case("qwen2", {**SP, "context": 2}, FULL, te=True),
    "te dense pp2, last stage": Case("qwen3_tied", {"pipeline": 2}, FULL, rank=1, te=True),
    "te experts tp2 ep2": Case("moe", {**SP, "expert": 2}, FULL, te=True),
    "te experts cp2 ep2": Case("moe", {"context": 2, "expert": 2}, KEPT, te=True),
    "te experts, a layer offloaded": Case("moe", policy={"offload_layers": 1}, te=True),
    **{
        fault: Case("moe" if "expert" in fault else "qwen3", te="te's" in fault, plant=fault)
        for fault in (
            *("item in attention", "item in an expert", "item in the head", "item in te's experts"),
            *("host memory in attention", "host memory in the head", "host memory in te's products"),
            *("float32 in attention", "float32 in an expert", "float32 in the head"),
            *("float32 in te's experts", "float32 in te's products"),
        )
    },
}


@dataclass
class Report:
    fault: str = ""
    waits: list[dict[str, Any]] = field(default_factory=list)
    wide: list[dict[str, Any]] = field(default_factory=list)
    types: dict[str, list[str]] = field(default_factory=dict)
    """Kinds of tensors by what they are for: dtype on device."""
    layer: str = ""
    """What a layer's first product is made by."""
    attention: dict[str, int] = field(default_factory=dict)
    """Calls of the flash kernels in the second update."""
    exchanges: int = 0
    """All-to-alls in the second update."""
    left: int = 0
    """Tensors that left for the host without a wait, until then."""
    weights: int = 0
    """Tensors that were exported."""


def run(case: Case, watch: Any, folder: Path) -> Report:
    from fakecuda.machine import fake_tensors, join_world, stages_exchange
    from fakecuda.plants import planted
    from spell_megatron.config import LayoutConfig, OptimizerConfig, PolicyConfig
    from spell_megatron.policy.world import start_world, stop_world

    watch.waits.clear(), watch.wide.clear()
    watch.left = 0
    watch.phase, report = "build", Report()
    join_world(case.rank, case.world)
    layout = LayoutConfig(**case.layout)
    policy = PolicyConfig(
        layout=layout,
        optimizer=OptimizerConfig(distributed=True, overlap=True, **case.optimizer),
        stream_tokens=512,
        **case.policy,
    )
    exchange: Any = contextlib.nullcontext()
    if layout.pipeline > 1:
        exchange = stages_exchange((_TOKENS // layout.context // layout.tensor, 1, 64))
    world = start_world(layout, seed=0, timeout_seconds=60)
    try:
        with planted(case.plant), exchange, fake_tensors(watch):
            _use(policy, folder, world, watch, report)
    except Exception:
        report.fault = traceback.format_exc()
    finally:
        stop_world()
    report.waits, report.wide = (
        [{**asdict(place), "count": count} for place, count in found.items()]
        for found in (watch.waits, watch.wide)
    )
    return report


_TOKENS = 320 + 4 * 32


def _use(policy: Any, folder: Path, world: Any, watch: Any, report: Report) -> None:
    from benchmarks.common import random_group
    from benchmarks.layers import layer_classes
    from spell_megatron.policy.colocation import LearnerOffload, _optimizer
    from spell_megatron.policy.learner import Learner
    from spell_megatron.types import TrainBatch

    learner = Learner(policy, folder, world)
    report.layer = type(learner.chunks[0].decoder.layers[0].self_attention.linear_qkv).__name__
    group = random_group(320, 4, 32, learner.shape.vocab)

    def kinds(tensors: Any) -> list[str]:
        return sorted(
            {f"{str(t.dtype).removeprefix('torch.')} on {t.device.type}" for t in tensors if t.ndim}
        )

    for streams in (1, 3):
        watch.phase = f"update of {streams}"
        watch.attention.clear()
        watch.exchanges = 0
        learner.update(TrainBatch((group,) * streams * world.data_size))
    report.attention, report.left, report.exchanges = dict(watch.attention), watch.left, watch.exchanges
    watch.phase = "score"
    learner.score(TrainBatch((group,) * world.data_size))
    report.types = {
        "parameters": kinds(p for _, p in learner.named_parameters()),
        "gradients": kinds(p.main_grad for _, p in learner.named_parameters()),
        "optimizer": kinds(_optimizer(learner)),
    }
    if policy.layout.pipeline == 1:  # else another stage would have to say what it has
        watch.phase = "weights"
        report.weights = sum(1 for _ in learner.weights())
    watch.phase = "offload"
    offload, parts = LearnerOffload(learner), frozenset({"parameters", "optimizer"})
    offload.offload(parts, frozenset())
    offload.onload(parts)
    if policy.layout == type(policy.layout)():
        watch.phase = "classes of layers"
        for _, measured in layer_classes(policy, folder, group, world, 1, 1e15):
            measured()


def head_bytes(top_p: float, watch: Any) -> int:
    """Read and written by the head of a large model, forward and backward: 1,024 rows, 151,936 tokens, 2,048 wide."""
    import torch

    from fakecuda.machine import fake_tensors, join_world
    from spell_megatron.policy.head import Sampled, token_logprobs

    join_world(0, 1)
    with fake_tensors(watch):
        wide = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
        hidden, weight = torch.empty(1024, 2048, **wide), torch.empty(151_936, 2048, **wide)
        targets, watch.bytes = torch.zeros(1024, dtype=torch.int64, device="cuda"), 0
        logprobs, _ = token_logprobs(
            hidden,
            weight,
            targets,
            sampled=Sampled(0.7, top_p),
            chunk=1024,
            tp_group=torch.distributed.group.WORLD,
        )
        logprobs.sum().backward()
    torch.distributed.destroy_process_group()
    return int(watch.bytes)


def main() -> None:
    logging.disable(logging.WARNING)
    from fakecuda import te

    if site := sys.argv[2]:
        te.install(Path(site))  # before megatron-core looks for it
    from models import make_model

    import megatron_patches
    from fakecuda.machine import switch_on
    from fakecuda.waits import Watch
    from spell_megatron.policy import inspection, learner, offload

    offload._LEAST = 0  # models are small
    learner.load_weights = lambda *_: None  # there are no values
    inspection.unsound_scores = lambda *_: None  # ranks that are not there left their places empty
    watch = Watch()
    watch.top_k = 2
    switch_on(watch)
    megatron_patches.apply()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in CASES.items():
            if case.te != bool(site) or (sys.argv[3:] and name not in sys.argv[3:]):
                continue
            folder = Path(scratch) / case.kind
            if not folder.is_dir():
                make_model(case.kind, folder)  # type: ignore[arg-type]
            found[name] = asdict(run(case, watch, folder))
    if not site:
        found["head"] = {str(top_p): head_bytes(top_p, watch) for top_p in (1.0, 0.95)}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
