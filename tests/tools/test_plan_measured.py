"""The planner against real learners: bytes of weights, gradients, optimizer and activations."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import traps
from models import make_model
from places import SUPPORT
from reference import random_batch

from spell_megatron.base.interpreter import python
from spell_megatron.config import (
    LayoutConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    load_config,
    model_recipes,
)
from spell_megatron.policy.colocation import torch_optimizers
from spell_megatron.policy.layout import check_layout
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import World
from spell_megatron.tools.plan import plan_all
from spell_megatron.tools.plan.activations import FullStream, activations
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.catalogue import architecture
from spell_megatron.tools.plan.findings import ROOM
from spell_megatron.tools.plan.parameters import stage_parameters, static_bytes
from spell_megatron.tools.plan.rehearsal import Build, rehearse
from spell_megatron.weights.shape import model_shape

pytestmark = pytest.mark.distributed

ACTIVATIONS = 0.15
STREAM = (600, 4, 200)  # prompt, responses, tokens of each
FLOAT = {"dtype": "float32", "stream_tokens": 2048, "head_chunk": 256}
SP2 = {"tensor": 2, "sequence": True}
CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        {"kind": "qwen3", "policy": FLOAT},
        {"kind": "qwen2", "policy": {**FLOAT, "recompute": "all_but_attention"}},
        {"kind": "moe", "policy": {**FLOAT, "recompute": "full"}},
    ],
    2: [
        {"kind": "qwen3", "policy": FLOAT, "layout": SP2},
        {"kind": "qwen3_tied", "policy": FLOAT, "layout": {"pipeline": 2}, "microbatches": 2},
        {"kind": "qwen2", "policy": FLOAT, "layout": {"context": 2}},
        {"kind": "qwen3", "policy": {**FLOAT, "dtype": "bfloat16"}, "optimizer": {"distributed": True}},
        {"kind": "moe", "policy": FLOAT, "layout": {**SP2, "expert": 2}, "optimizer": {"distributed": True}},
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wider than deep enough for activations to outweigh the odd small tensor."""
    root = tmp_path_factory.mktemp("models")
    size = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    more = {"moe_intermediate_size": 96, "num_experts": 8}
    kinds: tuple[Any, ...] = ("qwen3", "qwen3_tied", "qwen2", "moe")
    return {k: make_model(k, root / k, seed=1, **size, **(more if k == "moe" else {})) for k in kinds}


@pytest.mark.parametrize("world", CASES)
def test_planned_bytes_are_the_bytes_held(
    world: int, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(traps.lay(tmp_path / "work"))  # what the user has there does not matter
    cases = [{**case, "model": str(folders[case["kind"]]), "stream": STREAM} for case in CASES[world]]
    policies = [
        PolicyConfig(
            **case["policy"],
            layout=LayoutConfig(**case.get("layout", {})),
            optimizer=OptimizerConfig(**case.get("optimizer", {})),
        )
        for case in cases
    ]
    rehearsals = rehearse([Build(p, Path(c["model"]), world) for p, c in zip(policies, cases, strict=True)])
    for case, policy, rehearsal, measured in zip(
        cases, policies, rehearsals, _measure(world, cases, tmp_path), strict=True
    ):
        label = f"{case['kind']} {case.get('layout', {})}"
        for rank in rehearsal.ranks:
            row = measured[rank.rank]
            assert rank.dense + rank.expert == row["parameters"], label
            for kind in ("weights", "gradients", "optimizer"):
                assert getattr(rank, kind) == row[kind], f"{label} rank {rank.rank}: {kind}"
        if policy.dtype == "float32":  # on a CPU a bfloat16 norm computes through float32 copies
            _compare_activations(case, policy, measured, label)


def _compare_activations(
    case: dict[str, Any], policy: PolicyConfig, measured: list[dict[str, int]], label: str
) -> None:
    prompt, replies, reply = STREAM
    tokens, cp = prompt + replies * reply, policy.layout.context
    stream = FullStream(local=tokens / cp, whole=tokens, rows=replies * reply / cp)
    assumed = Assumptions(expert_imbalance=1.0, flash=False)
    stages = policy.layout.pipeline
    for stage in range(stages):
        planned = activations(
            model_shape(Path(case["model"])), policy, stage, stream, case.get("microbatches", 1), assumed
        )
        ranks = measured[stage * len(measured) // stages : (stage + 1) * len(measured) // stages]
        held = sum(row["peak"] for row in ranks) / len(ranks)  # experts differ by rank: their mean is planned
        assert planned.peak == pytest.approx(held, rel=ACTIVATIONS), f"{label} stage {stage}"


def _measure(world: int, cases: list[dict[str, Any]], tmp_path: Path) -> list[list[dict[str, int]]]:
    given, found = tmp_path / "cases.json", tmp_path / "found.json"
    given.write_text(json.dumps(cases))
    starter = python("launchers.ranks", str(world))
    done = subprocess.run(
        [*starter, "-W", "ignore", str(SUPPORT / "measured_memory.py"), str(given), str(found)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(found.read_text())


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_an_offloaded_optimizer_holds_the_planned_host_memory(
    kind: str, folders: dict[str, Path], world: World
) -> None:
    policy = PolicyConfig(optimizer=OptimizerConfig(distributed=True, cpu_offload=True), stream_tokens=2048)
    learner = Learner(policy, folders[kind], world)
    learner.update(random_batch(512))
    offloaded: list[Any] = list(torch_optimizers(learner.optimizer))
    tensors = [t for o in offloaded for t in (*o.inner_param_to_orig_param, *o.cpu_copy_map_grad.values())]
    tensors += [t for o in offloaded for state in o.state.values() for t in state.values() if t.numel() > 1]
    host = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    [part] = stage_parameters(learner.shape, policy.layout)
    assert host == static_bytes(part, policy, check_layout(policy.layout, learner.shape, 1)).host


def test_layers_of_transformer_engine_are_planned_without_it(folders: dict[str, Path]) -> None:
    """Where there is none, they are taken to hold what torch's hold, and so are those that compute in FP8."""
    policies = PolicyConfig(), PolicyConfig(spec="te"), PolicyConfig(fp8="blockwise")
    plain, *others = rehearse([Build(policy, folders["moe"], 1) for policy in policies])
    assert others == [plain, plain]


def test_every_shipped_recipe_is_built_and_fits() -> None:
    """The real models, at full world size: every weight covered once, arithmetic and model agreed, room left."""
    configs = [load_config(recipe) for recipe in model_recipes()]
    alike = {}  # what differs in no module and no buffer is built once
    for config in configs:
        shape = replace(model_shape(architecture(config.model.path)), max_positions=0)
        built = replace(config.policy, stream_tokens=1, loss=LossConfig())
        alike[repr((shape, built, config.cluster))] = config
    for found in plan_all(list(alike.values())):
        assert found.rehearsal is not None
        assert found.fits, found.config.name
        assert found.headroom >= ROOM, found.config.name
