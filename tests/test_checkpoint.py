"""Checkpoints: bit-equal resume, layouts that change between save and load, damage that is skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import make_model
from reference import random_batch

from spell_megatron.checkpoint import Checkpoints, load_learner, open_checkpoint
from spell_megatron.config import Layout, Optimizer, Policy
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.types import SpellError

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield start_world(Layout(), seed=0, timeout_seconds=60)
    stop_world()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3_tied", tmp_path_factory.mktemp("models") / "model", seed=1)


def policy(distributed: bool = False) -> Policy:
    return Policy(
        dtype="float32",
        stream_tokens=512,
        optimizer=Optimizer(lr=1e-3, warmup_steps=4, distributed=distributed),
    )


@pytest.mark.parametrize("distributed", [False, True])
def test_a_resumed_learner_goes_on_bit_by_bit(
    world: World, folder: Path, tmp_path: Path, distributed: bool
) -> None:
    batch = random_batch(256)
    learner = Learner(policy(distributed), folder, world)
    learner.update(batch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, learner, {"memory": [1, 2]})
    expected = [learner.update(batch) for _ in range(2)]
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.run) == (1, {"memory": [1, 2]})
    other = Learner(policy(distributed), folder, world)
    load_learner(other, found)
    resumed = [other.update(batch) for _ in range(2)]
    assert [(u.loss, u.grad_norm, u.lr) for u in resumed] == [(u.loss, u.grad_norm, u.lr) for u in expected]
    pairs = zip(learner.weights(), other.weights(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_learner_that_never_stepped_can_be_saved(
    world: World, folder: Path, tmp_path: Path, distributed: bool
) -> None:
    learner = Learner(policy(distributed), folder, world)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, learner, {})
    found = checkpoints.newest()
    assert found is not None
    other = Learner(policy(distributed), folder, world)
    load_learner(other, found)
    batch = random_batch(256)
    assert other.update(batch).grad_norm == learner.update(batch).grad_norm


def test_damage_and_half_written_folders_are_skipped(
    world: World, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = Learner(policy(), folder, world)
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, learner, {})
    flipped = max((tmp_path / "step-00004").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (tmp_path / "step-00003" / "run.json").write_text('{"step"', encoding="utf-8")
    (tmp_path / "step-00005.partial").mkdir()
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 2
    assert "step-00004 is not whole" in caplog.text
    assert "step-00003 is not whole" in caplog.text
    with pytest.raises(SpellError, match="damaged"):
        open_checkpoint(tmp_path / "step-00004")


def test_only_the_last_are_kept(world: World, folder: Path, tmp_path: Path) -> None:
    learner = Learner(policy(), folder, world)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 5):
        checkpoints.save(step, learner, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00003", "step-00004"]


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("qwen3_tied", (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2})),
        ("moe", (2, {"expert": 2}), (2, {"tensor": 2, "sequence": True})),
        ("moe", (2, {"pipeline": 2}), (1, {})),
    ],
)
def test_the_layout_may_change_between_save_and_resume(
    kind: str, before: tuple[int, dict[str, int]], after: tuple[int, dict[str, int]], tmp_path: Path
) -> None:
    make_model(kind, tmp_path / "model", seed=1, initializer_range=0.1)  # type: ignore[arg-type]
    losses = [run_program(tmp_path, "save", *before), run_program(tmp_path, "load", *after)]
    for saved, loaded in zip(*losses, strict=True):
        assert loaded == pytest.approx(saved, rel=TOLERANCE)


def run_program(folder: Path, mode: str, world: int, layout: dict[str, int]) -> list[float]:
    """Log-prob sums after each of the next two updates, from reshard.py under torchrun."""
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={world}", str(HERE / "reshard.py"), mode, str(folder), json.dumps(layout),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"{mode}.json").read_text(encoding="utf-8"))
