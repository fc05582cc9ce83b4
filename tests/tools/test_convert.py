"""Conversions: bit by bit, of what a run leaves and of what begins one, with the weights in host memory and no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import Kind, make_model
from reference import random_batch
from safetensors.torch import load_file
from torch import Tensor

from spell_megatron.config import Dtype, LayoutConfig, OptimizerConfig, PolicyConfig
from spell_megatron.policy import learner as learner_module
from spell_megatron.policy.checkpoint import Checkpoints, load_policy, open_checkpoint
from spell_megatron.policy.learner import HeldPolicy, Learner
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.tools.convert import export_hf, import_hf

pytestmark = pytest.mark.unit

BATCH = random_batch(256, shapes=((20, (5, 9)), (11, (7,))))


@contextmanager
def ranks() -> Iterator[World]:
    """A world of one rank; conversions have one of their own."""
    try:
        yield start_world(LayoutConfig(), seed=0, timeout_seconds=60)
    finally:
        stop_world()


def trained(folder: Path, run: Path, policy: PolicyConfig) -> dict[str, Tensor]:
    """A run's folder after one update; the weights that it has by then."""
    run.mkdir()
    settings = {"dtype": policy.dtype, "freeze_router": policy.freeze_router}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(folder)}, "policy": settings}))
    with ranks() as world:
        learner = Learner(policy, folder, world)
        learner.update(BATCH)
        Checkpoints(run / "checkpoints").save(1, learner, {})
        return {name: tensor.clone() for name, tensor in learner.weights()}


def equal(folder: Path, weights: dict[str, Tensor]) -> bool:
    found = load_file(folder / "model.safetensors")
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("what trains a policy was made")


@pytest.fixture
def weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient buffers and optimizers are a fault, and so is anything on the GPU (`meta` here)."""
    monkeypatch.setattr(learner_module, "wrap_data_parallel", fail)
    monkeypatch.setattr(learner_module, "build_optimizer", fail)
    with ranks():
        pass  # which gives `current_device` its name, once
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_runs_policy_is_exported_whether_its_routers_were_trained_or_not(
    tmp_path: Path, dtype: Dtype, frozen: bool, request: pytest.FixtureRequest
) -> None:
    folder = make_model("moe", tmp_path / "model", seed=1)
    optimizer = OptimizerConfig(lr=1e-2, distributed=True)
    policy = PolicyConfig(dtype=dtype, stream_tokens=192, freeze_router=frozen, optimizer=optimizer)
    weights = trained(folder, tmp_path / "run", policy)
    request.getfixturevalue("weights_alone")
    export_hf(tmp_path / "run", tmp_path / "hf")
    assert equal(tmp_path / "hf", weights)
    assert not equal(folder, weights), "nothing was learned"


@pytest.mark.usefixtures("weights_alone")
@pytest.mark.parametrize("kind", ["moe", "qwen3_tied"])
def test_there_and_back_is_the_same_and_takes_no_more_than_the_weights(tmp_path: Path, kind: Kind) -> None:
    folder = make_model(kind, tmp_path / "model", seed=2)
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    assert equal(tmp_path / "back", load_file(folder / "model.safetensors"))


def test_the_state_of_the_optimizer_is_not_read(tmp_path: Path) -> None:
    folder = make_model("qwen3", tmp_path / "model", seed=1)
    weights = trained(folder, tmp_path / "run", PolicyConfig(stream_tokens=192))
    with ranks() as world:
        policy = HeldPolicy(PolicyConfig(), folder, world)
        read = load_policy(policy, open_checkpoint(tmp_path / "run"))
    assert read == sum(tensor.nbytes for tensor in weights.values())


@pytest.mark.parametrize("distributed", [False, True])
def test_an_import_begins_a_training_as_its_folder_does(tmp_path: Path, distributed: bool) -> None:
    folder, other = (make_model("qwen3", tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    import_hf(folder, tmp_path / "megatron")
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=3, distributed=distributed)
    policy = PolicyConfig(dtype="float32", stream_tokens=192, optimizer=optimizer)
    with ranks() as world:
        expected, ours = (Learner(policy, path, world) for path in (folder, other))
        found = Checkpoints(tmp_path / "megatron" / "checkpoints").restore(ours)
        assert found and found.step == 0
        for _ in range(2):
            one, two = (learner.update(BATCH) for learner in (expected, ours))
            assert (one.loss, one.grad_norm, one.lr) == (two.loss, two.grad_norm, two.lr)
        pairs = zip(expected.weights(), ours.weights(), strict=True)
        assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_folder_has_its_name_when_every_byte_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """A power cut after the renaming finds every file, and before it the output that was there."""
    folder, out = make_model("qwen3", tmp_path / "model"), tmp_path / "out"
    import_hf(folder, tmp_path / "megatron")
    if replaces:
        export_hf(tmp_path / "megatron", out)
    synced, missing, acts = set[tuple[str, int]](), list[str](), list[str]()
    fsync, rename = os.fsync, Path.rename

    def state(path: Path) -> tuple[str, int]:
        return str(path), path.stat().st_mtime_ns

    def noted(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.add(state(path))
        acts.append(f"{path.name} synced")
        fsync(handle)

    def checked(path: Path, target: Path) -> Path:
        if target == out:
            missing.extend(str(p) for p in (path, *path.rglob("*")) if state(p) not in synced)
            acts.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", checked)
    export_hf(tmp_path / "megatron", out)
    assert missing == []
    assert acts[-2:] == ["renamed", f"{tmp_path.name} synced"]
