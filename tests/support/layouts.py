"""The layout matrix: every parallel layout against plain Hugging Face transformers, in float32.

    python -m launchers.ranks 4 tests/support/layouts.py --out results.json CASE …

runs cases of that world size one after another in one set of processes. With `--table [CASE …]` alone it
runs them (all, where none is named), prints the table that stands in docs/layouts.md, and fails where a row does.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import subprocess
import sys
import tempfile
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from spell_megatron.base.interpreter import python

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    name: str
    world: int
    kinds: tuple[str, ...] = ("qwen3_tied", "qwen2")
    layout: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    fast: bool = False
    """Runs in CI; the others by `--table`."""
    model: dict[str, Any] = field(default_factory=dict)


MOE = ("moe",)
SP = {"sequence": True}
REPLAY = {"router_replay": True}
"""The routers are told experts drawn at random, there and here."""
KEPT = {"recompute": "all_but_attention"}
DEEPEP = {"dispatcher": "deepep"}
"""A stand-in for its kernels sends tokens (`deepep.py`)."""
CASES = (
    Case("single", 1, ("qwen3", "qwen3_tied", "qwen2", "moe", "llama", "llama_tied", "mistral"), fast=True),
    Case("single recompute", 1, ("qwen3", "moe"), policy={"recompute": "full"}),
    Case("single, attention kept", 1, ("qwen3", "moe"), policy=KEPT, fast=True),
    Case("single, offloaded", 1, ("qwen3", "moe"), policy={"offload_layers": 1}),
    Case("tp2", 2, layout={"tensor": 2}),
    Case(
        "tp2+sp",
        2,
        ("qwen3", "qwen3_tied", "qwen2", "moe", "llama", "llama_tied"),
        {"tensor": 2, **SP},
        fast=True,
    ),
    Case("tp2+sp recompute", 2, ("qwen3", "moe"), {"tensor": 2, **SP}, policy={"recompute": "full"}),
    Case("pp2", 2, ("qwen3", "qwen3_tied", "moe", "llama", "llama_tied"), {"pipeline": 2}, fast=True),
    Case(
        "vpp2",
        2,
        ("qwen3", "qwen3_tied", "moe"),
        {"pipeline": 2, "virtual_pipeline": 2},
        model={"num_hidden_layers": 4},
        fast=True,
    ),
    Case("cp2", 2, ("qwen3_tied", "qwen2", "moe", "llama", "llama_tied"), {"context": 2}, fast=True),
    Case("ep2", 2, MOE, {"expert": 2}, fast=True),
    Case(
        "ep2, some recompute",
        2,
        MOE,
        {"expert": 2},
        policy={"recompute": "full", "recompute_layers": 1},
        fast=True,
    ),
    Case("ep1 dp2", 2, MOE, {}),
    Case("ep2, DeepEP", 2, MOE, {"expert": 2}, policy=DEEPEP, fast=True),
    Case("tp2·etp2+sp, DeepEP", 2, MOE, {"tensor": 2, "expert_tensor": 2, **SP}, policy=DEEPEP),
    Case("tp2·ep2+sp, DeepEP", 4, MOE, {"tensor": 2, "expert": 2, **SP}, policy=DEEPEP, fast=True),
    Case("ep4 recompute, DeepEP", 4, MOE, {"expert": 4}, policy={**DEEPEP, "recompute": "full"}),
    Case("replay cp2·ep2, DeepEP", 2, MOE, {"context": 2, "expert": 2}, policy={**DEEPEP, **REPLAY}),
    Case("dp2", 2, ("qwen3_tied", "moe"), fast=True),
    Case("dp2+distributed", 2, ("qwen3_tied", "moe"), optimizer={"distributed": True}, fast=True),
    Case("dp2+overlap", 2, ("qwen3_tied", "moe"), optimizer={"distributed": True, "overlap": True}),
    Case(
        "kv heads < tp",
        2,
        ("qwen3", "qwen2", "llama", "llama_tied"),
        {"tensor": 2},
        model={"num_key_value_heads": 1},
    ),
    Case("kv heads < tp+sp", 4, ("qwen3", "qwen2", "moe"), {"tensor": 4, **SP}),
    Case("cp4", 4, ("qwen3_tied", "qwen2"), {"context": 4}),
    Case("tp2·pp2", 4, ("qwen3_tied", "qwen2"), {"tensor": 2, "pipeline": 2}),
    Case("tp2·cp2+sp", 4, ("qwen3_tied", "qwen2"), {"tensor": 2, "context": 2, **SP}, fast=True),
    Case("tp2·ep2+sp", 4, MOE, {"tensor": 2, "expert": 2, **SP}, fast=True),
    Case("ep2·pp2", 4, MOE, {"expert": 2, "pipeline": 2}),
    Case("tp2·etp2+sp", 2, MOE, {"tensor": 2, "expert_tensor": 2, **SP}, fast=True),
    Case("ep2·etp2", 4, MOE, {"tensor": 2, "expert": 2, "expert_tensor": 2, **SP}),
    Case("cp2·ep2", 2, MOE, {"context": 2, "expert": 2}),
    Case("replay", 1, MOE, policy=REPLAY, fast=True),
    Case(
        "replay tp2+sp recompute",
        2,
        MOE,
        {"tensor": 2, **SP},
        policy={"recompute": "full", **REPLAY},
        fast=True,
    ),
    Case("cp2, attention kept", 2, ("qwen3_tied", "moe"), {"context": 2}, policy=KEPT, fast=True),
    Case(
        "vpp2, attention kept",
        2,
        ("qwen3", "moe"),
        {"pipeline": 2, "virtual_pipeline": 2},
        policy=KEPT,
        model={"num_hidden_layers": 4},
    ),
    Case(
        "pp2, some kept, some offloaded",
        2,
        MOE,
        {"pipeline": 2},
        policy={**KEPT, "recompute_layers": 1, "offload_layers": 1},
        model={"num_hidden_layers": 6},
        fast=True,
    ),
    Case("replay pp2 recompute", 2, MOE, {"pipeline": 2}, policy={"recompute": "full", **REPLAY}, fast=True),
    Case(
        "replay vpp2",
        2,
        MOE,
        {"pipeline": 2, "virtual_pipeline": 2},
        policy=REPLAY,
        model={"num_hidden_layers": 4},
    ),
    Case("replay cp2·ep2", 2, MOE, {"context": 2, "expert": 2}, policy=REPLAY, fast=True),
    Case("replay tp2·pp2·ep2+sp", 4, MOE, {"tensor": 2, "pipeline": 2, "expert": 2, **SP}, policy=REPLAY),
    Case("cp2·pp2·dp1", 4, ("qwen3_tied", "moe"), {"context": 2, "pipeline": 2}),
    Case("tp2·dp2+distributed+sp", 4, ("qwen3", "moe"), {"tensor": 2, **SP}, {"distributed": True}),
    Case("tp2·pp2·ep2+sp", 4, MOE, {"tensor": 2, "pipeline": 2, "expert": 2, **SP}),
)


@dataclass(frozen=True)
class Result:
    case: str
    kind: str
    shared: bool
    world: int
    loss: float
    logprobs: float
    gradients: float
    norm: float
    step: float
    """Relative error of the weights' change in one AdamW step."""
    exact: bool
    """HF to Megatron to HF, bit by bit, in float32 and bfloat16."""
    again: bool
    """Where experts are exchanged, gradients are the same bits as without recomputation."""
    counted: bool
    """The update's tokens are those of all ranks."""

    @property
    def passed(self) -> bool:
        errors = (self.loss, self.logprobs, self.gradients, self.norm, self.step)
        return self.exact and self.again and self.counted and all(error <= TOLERANCE for error in errors)


def run_cases(names: list[str], out: Path) -> None:
    """Body of one world: every rank runs it, rank 0 compares and writes."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import deepep
    import torch

    deepep.install()
    from spell_megatron.policy import offload

    offload._LEAST = 0
    torch.set_num_threads(1)
    results = [result for case in CASES if case.name in names for result in _run_case(case)]
    from spell_megatron.policy.world import stop_world

    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps([asdict(result) for result in results]))
    stop_world()


def _run_case(case: Case) -> list[Result]:
    import torch.distributed as dist

    from megatron_patches import cpu_products
    from spell_megatron.config import LayoutConfig
    from spell_megatron.policy.world import start_world

    results = []
    world = start_world(LayoutConfig(**case.layout), seed=0, timeout_seconds=120)
    for kind, shared in product(case.kinds, (True, False)):
        # Half of the cases multiply as models do that are not as small as these.
        with nullcontext() if shared else patch.multiple(cpu_products, _WORTH_IT=1, _GRAIN=16):
            results.append(_compare(case, kind, shared, world))
        dist.barrier()
    return [result for result in results if result]


def _compare(case: Case, kind: str, shared: bool, world: Any) -> Result | None:
    """Rank 0 gets the result."""
    from reference import relative_error

    from spell_megatron.config import LayoutConfig, OptimizerConfig, PolicyConfig
    from spell_megatron.policy.learner import Learner
    from spell_megatron.policy.optimizer import main_gradient

    folder, batch, expected = _reference(kind, json.dumps(case.model), "router_replay" in case.policy)
    # An eps of the gradients' size keeps Adam's first step from being a mere sign, and a large rate
    # keeps the rounding of the weights out of the difference.
    # A step that is large beside the weights: their difference has all its digits.
    large = {"lr": 100.0, "max_growth": 1e9}
    optimizer = OptimizerConfig(**large, eps=1.0, weight_decay=0.0, clip_grad=1e9, **case.optimizer)
    policy = PolicyConfig(
        layout=LayoutConfig(**case.layout),
        optimizer=optimizer,
        dtype="float32",
        stream_tokens=192,
        share_prompts=shared,
        head_chunk=16,
        **case.policy,
    )
    learner = Learner(policy, folder, world)
    before = {name: tensor.clone() for name, tensor in learner.weights()}
    exact = _is_exact(folder, before) and _bfloat16_exact(policy, folder, world)
    loss = learner.gradients(batch)
    gradients = {}
    if not optimizer.distributed:  # else every rank holds the sum of its own shard only
        gradients = {n: t.clone() for n, t in learner.weights(main_gradient)}
    again = not (shared and gradients) or _as_kept(policy, folder, world, batch, gradients)
    scores = learner.score(batch)
    update = learner.update(batch)
    moved = {name: tensor - before[name] for name, tensor in learner.weights()}
    if not world.is_main:
        return None
    gaps = [
        abs(a - b).max()
        for ours, theirs in zip(scores.logprobs, expected.logprobs, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    step = {n: -100.0 * g / (g.abs() + 1.0) for n, g in expected.gradients.items()}
    true_norm = math.sqrt(sum(float((g * g).sum()) for g in expected.gradients.values()))
    scale = max(float(abs(x).max()) for group in expected.logprobs for x in group)
    return Result(
        case.name,
        kind,
        shared,
        case.world,
        loss=abs(loss - expected.loss) / abs(expected.loss),
        logprobs=float(max(gaps)) / scale,
        gradients=max((relative_error(gradients[n], expected.gradients[n]) for n in gradients), default=0.0),
        norm=abs(update.grad_norm - true_norm) / true_norm,
        step=max(relative_error(moved[n], step[n]) for n in moved),
        exact=exact,
        again=again,
        counted=update.tokens >= sum(len(group.prompt) + group.response_tokens for group in batch.groups),
    )


@cache
def _reference(kind: str, overrides: str, replay: bool) -> tuple[Path, Any, Any]:
    import torch.distributed as dist
    from models import make_config, make_model
    from reference import random_batch, reference, with_experts

    folder = (
        Path(tempfile.gettempdir())
        / f"spell-layouts-{dist.get_world_size()}"
        / f"{kind}-{zlib.crc32(overrides.encode())}"
    )
    shape = {"initializer_range": 0.1, **json.loads(overrides)}
    batch, expected = random_batch(256), None
    if replay:
        config = make_config(kind, **shape)  # type: ignore[arg-type]
        batch = with_experts(batch, config.num_hidden_layers, config.num_experts, config.num_experts_per_tok)
    if dist.get_rank() == 0:
        make_model(kind, folder, seed=1, **shape)  # type: ignore[arg-type]
        expected = reference(folder, batch)
    dist.barrier()
    return folder, batch, expected


def _is_exact(folder: Path, weights: dict[str, Any]) -> bool:
    import torch
    from safetensors.torch import load_file

    original = load_file(folder / "model.safetensors")
    return original.keys() == weights.keys() and all(torch.equal(original[n], weights[n]) for n in weights)


def _bfloat16_exact(policy: Any, folder: Path, world: Any) -> bool:
    import torch
    from safetensors.torch import load_file

    from spell_megatron.policy.model import build_chunks
    from spell_megatron.weights.contents import read_contents
    from spell_megatron.weights.convert import load_weights, stream_weights
    from spell_megatron.weights.files import ModelFolder
    from spell_megatron.weights.shape import model_shape

    shape = model_shape(folder)
    chunks = build_chunks(replace(policy, dtype="bfloat16"), shape, folder)
    load_weights(chunks, shape, ModelFolder(read_contents(folder)))
    original = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    return all(torch.equal(original[n], t) for n, t in stream_weights(chunks, shape))


def _as_kept(policy: Any, folder: Path, world: Any, batch: Any, gradients: dict[str, Any]) -> bool:
    """Whether gradients are what they are without recomputation. Asked where recomputed layers exchange experts alone:
    what else there is to it, `test_offload.py` sees on one rank."""
    import torch

    from spell_megatron.policy.learner import Learner
    from spell_megatron.policy.optimizer import main_gradient

    if policy.recompute == "none" or policy.layout.expert == 1:
        return True
    learner = Learner(replace(policy, recompute="none", recompute_layers=None), folder, world)
    learner.gradients(batch)
    same = [torch.equal(gradients[name], other) for name, other in learner.weights(main_gradient)]
    return all(same)


def launch(world: int, names: list[str]) -> list[Result]:
    """Run cases of one world size and read what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [
            *python("launchers.ranks", str(world)),
            "-W",
            "ignore",
            __file__,
            "--out",
            str(out),
            *names,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise RuntimeError(f"the ranks failed:\n{done.stderr[-20000:]}")
        return [Result(**row) for row in json.loads(out.read_text())]


def table(results: list[Result]) -> str:
    lines = [
        "| layout | model | prompts | ranks | loss | log-probs | gradients | norm | AdamW step | HF round trip |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        gradients = f"{r.gradients:.1e}" if r.gradients else "sharded"
        prompts, trip = "shared" if r.shared else "packed", "bit-exact" if r.exact else "DIFFERS"
        errors = f"{r.loss:.1e} | {r.logprobs:.1e} | {gradients} | {r.norm:.1e} | {r.step:.1e}"
        lines.append(f"| {r.case} | {r.kind} | {prompts} | {r.world} | {errors} | {trip} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if not args.table:
        run_cases(args.names, args.out)
        return
    chosen = [case for case in CASES if not args.names or case.name in args.names]
    results: list[Result] = []
    for world in sorted({case.world for case in chosen}):
        results += launch(world, [case.name for case in chosen if case.world == world])
    sys.stdout.write(table(results) + "\n")
    failed = [result for result in results if not result.passed]
    sys.exit("\n".join(f"FAILED {result}" for result in failed) if failed else 0)


if __name__ == "__main__":
    main()
