"""Checkpoints: bit-equal resume, layouts that change between save and load, damage, full disks, retention."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import threading
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Kind, make_model
from places import SUPPORT
from reference import random_batch
from stumbling import stumbling
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from spell_megatron.base.interpreter import python
from spell_megatron.config import Dtype, LayoutConfig, OptimizerConfig, PolicyConfig
from spell_megatron.policy.checkpoint import Checkpoints, files, load_learner, open_checkpoint
from spell_megatron.policy.checkpoint.boxes import Box
from spell_megatron.policy.checkpoint.files import digests
from spell_megatron.policy.checkpoint.index import read_index
from spell_megatron.policy.checkpoint.parts import TensorPart
from spell_megatron.policy.checkpoint.read import read_parts
from spell_megatron.policy.checkpoint.write import Staged
from spell_megatron.policy.layout import check_layout
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import World
from spell_megatron.tools.plan.parameters import stage_parameters
from spell_megatron.tools.plan.saving import saved_bytes
from spell_megatron.types import SpellError
from spell_megatron.weights.shape import model_shape

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3_tied", tmp_path_factory.mktemp("models") / "model", seed=1)


def policy(dtype: Dtype = "float32", **optimizer: bool) -> PolicyConfig:
    return PolicyConfig(
        dtype=dtype, stream_tokens=512, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=4, **optimizer)
    )


POLICIES = {
    "float32": policy(),
    "float32, sharded": policy(distributed=True),
    "bfloat16": policy("bfloat16"),
    "bfloat16, sharded": policy("bfloat16", distributed=True),
    "bfloat16, offloaded": policy("bfloat16", distributed=True, cpu_offload=True),
}


@pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("background", [False, True])
def test_a_resumed_learner_goes_on_bit_by_bit(
    world: World, folder: Path, tmp_path: Path, settings: PolicyConfig, background: bool
) -> None:
    """In the background, too: what is written is the state at `save`, though the weights change meanwhile."""
    batch = random_batch(256)
    learner = Learner(settings, folder, world)
    learner.update(batch)
    checkpoints = Checkpoints(tmp_path, background=background)
    checkpoints.save(1, learner, {"memory": [1, 2]})
    expected = [learner.update(batch) for _ in range(2)]
    checkpoints.wait()
    other = Learner(settings, folder, world)
    again = Checkpoints(tmp_path)
    found = again.restore(other)
    assert found is not None
    assert (found.step, found.run, again.saved) == (1, {"memory": [1, 2]}, 1)
    resumed = [other.update(batch) for _ in range(2)]
    assert [(u.loss, u.grad_norm, u.lr) for u in resumed] == [(u.loss, u.grad_norm, u.lr) for u in expected]
    pairs = zip(learner.weights(), other.weights(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_learner_has_its_own_settings_of_adam(
    world: World, folder: Path, tmp_path: Path, name: str
) -> None:
    """Not those of the checkpoint: the next update is that of a learner which had them all along, given its state."""
    batch, checkpoints = random_batch(256), Checkpoints(tmp_path)
    learner = Learner(POLICIES[name], folder, world)
    learner.update(batch)
    checkpoints.save(1, learner, {})
    changed = replace(POLICIES[name].optimizer, lr=2e-3, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3)
    other = Learner(replace(POLICIES[name], optimizer=changed), folder, world)
    assert checkpoints.restore(other)
    for group in learner.optimizer.param_groups:  # what a restored one should be, set by hand
        group.update(betas=changed.betas, eps=changed.eps, max_lr=changed.lr)
    learner.schedule.max_lr, learner.schedule.init_lr = changed.lr, other.schedule.init_lr
    learner.schedule.start_wd = learner.schedule.end_wd = changed.weight_decay
    learner.schedule.step(0)
    assert learner.update(batch).lr == other.update(batch).lr
    pairs = zip(learner.weights(), other.weights(), strict=True)
    assert all(torch.equal(x, y) for (_, x), (_, y) in pairs)


@pytest.mark.parametrize("before", ["bfloat16, sharded", "bfloat16, offloaded"])
def test_an_optimizer_may_move_to_host_memory_and_back(
    world: World, folder: Path, tmp_path: Path, before: str
) -> None:
    """The same steps wherever its state is, and whoever saved it."""
    [after] = {"bfloat16, sharded", "bfloat16, offloaded"} - {before}
    batch, checkpoints = random_batch(256), Checkpoints(tmp_path)
    learner, other = (Learner(POLICIES[name], folder, world) for name in (before, after))
    learner.update(batch)
    checkpoints.save(1, learner, {})
    assert checkpoints.restore(other)
    for _ in range(2):
        assert learner.update(batch).grad_norm == other.update(batch).grad_norm
    pairs = zip(learner.weights(), other.weights(), strict=True)
    assert all(torch.equal(x, y) for (_, x), (_, y) in pairs)


PRECISIONS = [
    *(("float32", "bfloat16"), ("bfloat16", "float32"), ("float32, sharded", "bfloat16, offloaded")),
    *(("float32", "bfloat16, sharded"), ("bfloat16, sharded", "float32, sharded")),
]


@pytest.mark.parametrize(("before", "after"), PRECISIONS)
def test_another_precision_goes_on_from_the_float32_weights(
    world: World, folder: Path, tmp_path: Path, before: str, after: str
) -> None:
    """Of a run in float32 those are its weights, of one in bfloat16 its optimizer's."""
    learner, other = (Learner(POLICIES[name], folder, world) for name in (before, after))
    for _ in range(2):
        learner.update(random_batch(256))
    Checkpoints(tmp_path / "one").save(2, learner, {})
    assert Checkpoints(tmp_path / "one").restore(other)
    Checkpoints(tmp_path / "other").save(2, other, {})
    one, two = (whole_tensors(tmp_path / name) for name in ("one", "other"))
    masters = [
        {
            name: found.get(f"optimizer.state.param.{name}", found[name])
            for name in found
            if "state" not in name
        }
        for found in (one, two)
    ]
    for name, tensor in masters[0].items():
        assert tensor.dtype == masters[1][name].dtype == torch.float32
        assert torch.equal(tensor, masters[1][name])
        assert torch.equal(two[name], tensor.to(other.dtype))
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"optimizer.state.{moment}.{name}"
            assert torch.equal(one[key], two[key])
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters[0].values())
    assert learner.update(random_batch(256)).lr == other.update(random_batch(256)).lr


@pytest.mark.parametrize("name", ["float32", "bfloat16, sharded"])
def test_routers_that_were_frozen_have_no_moments_to_go_on_with(
    world: World, tmp_path: Path, name: str
) -> None:
    mixture = make_model("moe", tmp_path / "model", seed=1)
    frozen, free = (
        Learner(replace(POLICIES[name], freeze_router=on), mixture, world) for on in (True, False)
    )
    frozen.update(random_batch(256))
    Checkpoints(tmp_path / "frozen").save(1, frozen, {})
    with pytest.raises(
        SpellError, match=r"mlp\.router\.weight, .*policy\.freeze_router=true .*Leave the key true"
    ):
        Checkpoints(tmp_path / "frozen").restore(free)
    other = Learner(replace(POLICIES[name], freeze_router=False), mixture, world)
    other.update(random_batch(256))
    Checkpoints(tmp_path / "free").save(1, other, {})
    assert Checkpoints(tmp_path / "free").restore(frozen)
    pairs = zip(other.weights(), frozen.weights(), strict=True)
    assert all(torch.equal(x, y) for (_, x), (_, y) in pairs)


@pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)
def test_a_learner_that_never_stepped_can_be_saved(
    world: World, folder: Path, tmp_path: Path, settings: PolicyConfig
) -> None:
    learner = Learner(settings, folder, world)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, learner, {})
    found = checkpoints.newest()
    assert found is not None
    other = Learner(settings, folder, world)
    load_learner(other, found)
    batch = random_batch(256)
    assert other.update(batch).grad_norm == learner.update(batch).grad_norm


class Slow:
    """A learner's files that take as long as the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        write = Staged.write

        def slowly(staged: Staged) -> object:
            self.begun.set()
            assert self.go.wait(30)
            return write(staged)

        monkeypatch.setattr(Staged, "write", slowly)


def test_training_goes_on_while_a_checkpoint_is_written(
    world: World, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, checkpoints = Learner(policy(), folder, world), Checkpoints(tmp_path, background=True)
    slow = Slow(monkeypatch)
    checkpoints.save(1, learner, {})
    assert slow.begun.wait(30)
    learner.update(random_batch(256))
    assert checkpoints.newest() is None
    assert names(tmp_path) == ["step-00001.partial"]
    slow.go.set()
    checkpoints.save(2, learner, {})  # waits for the first
    assert names(tmp_path)[0] == "step-00001"
    checkpoints.close()
    assert names(tmp_path) == ["step-00001", "step-00002"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_damage_and_half_written_folders_are_skipped(
    world: World, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = Learner(policy(), folder, world)
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(step, learner, {})
    flipped = max((tmp_path / "step-00005").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    flip(flipped)
    (tmp_path / "step-00004" / "run.json").write_text('{"step"', encoding="utf-8")
    (tmp_path / "step-00003" / "learner" / "common.pt").unlink()
    (tmp_path / "step-00006.partial").mkdir()
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 2
    for step, fault in ((5, "damaged"), (4, "run.json is damaged"), (3, "common.pt is missing")):
        assert re.search(f"step-0000{step} is not whole: .*{fault}", caplog.text)
    with pytest.raises(SpellError, match="damaged"):
        open_checkpoint(tmp_path / "step-00005")
    checkpoints.restore(learner)
    checkpoints.save(3, learner, {})
    suspects = [f"step-0000{step}.suspect-1" for step in (3, 4, 5)]
    assert names(tmp_path) == sorted(["step-00001", "step-00002", "step-00003", *suspects])


def test_the_last_and_every_nth_are_kept(world: World, folder: Path, tmp_path: Path) -> None:
    learner = Learner(policy(), folder, world)
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=3)
    for step in range(1, 9):
        checkpoints.save(step, learner, {})
    assert names(tmp_path) == [f"step-0000{step}" for step in (3, 6, 7, 8)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"this user cannot mount a small file system: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("left", [0, 8, 256], ids=lambda kib: f"{kib} KiB left")
def test_a_full_disk_keeps_the_last_good_state(
    world: World, folder: Path, small_disk: Path, background: bool, left: int
) -> None:
    """Full at once, full after the first small files, full in the middle of the weights."""
    learner = Learner(policy(), folder, world)
    learner.update(random_batch(256))
    checkpoints = Checkpoints(small_disk / "checkpoints", background=background)
    checkpoints.save(1, learner, {"good": True})
    checkpoints.wait()
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - left * 1024))

    def save() -> None:
        checkpoints.save(2, learner, {})
        checkpoints.wait()

    with pytest.raises(SpellError, match=r"cannot write the checkpoint .*step-00002: the disk is full"):
        save()
    assert names(checkpoints.folder) == ["step-00001"]
    ballast.unlink()
    found = checkpoints.newest()
    assert found is not None
    assert found.run == {"good": True}
    checkpoints.save(3, learner, {})
    checkpoints.close()
    assert names(checkpoints.folder) == ["step-00001", "step-00003"]


def test_a_folder_that_cannot_be_written_is_one_clear_error(
    world: World, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("a file stands in the way")
    with pytest.raises(SpellError, match=r"cannot write the checkpoint .*step-00001"):
        Checkpoints(tmp_path / "checkpoints").save(1, Learner(policy(), folder, world), {})


@pytest.mark.parametrize("first", range(1, 8))
def test_a_file_system_that_stumbles_loses_no_state(
    world: World, folder: Path, tmp_path: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The k-th call fails, for every k, through a resume and a save by torch's own writer."""
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.0)
    learner = Learner(policy(), folder, world)
    for step in (1, 2):
        Checkpoints(tmp_path / "run").save(step, learner, {})

    def cycle(fails: Container[int]) -> int:
        """The calls of a resume and a save. Whatever ends them, the last good state can be taken over."""
        place = tmp_path / "copy"
        shutil.copytree(tmp_path / "run", place)
        shutil.copy(tmp_path / "run.json", tmp_path / "copy.json")
        checkpoints = Checkpoints(place)
        with stumbling(tmp_path, fails.__contains__, errno.EIO) as shim, suppress(SpellError):
            found = checkpoints.restore(learner)
            assert found is not None
            assert found.step == 2
            checkpoints.save(3, learner, {})
        found = Checkpoints(place).restore(learner)
        assert found is not None, f"calls {fails}"
        assert found.step in (2, 3), f"calls {fails}"
        shutil.rmtree(place)
        return shim.calls

    calls = cycle(())
    assert calls > 100
    for number in range(first, calls + 1, 7):
        cycle([number])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/evil",)


@pytest.mark.parametrize(
    "index", [Evil(), Metadata({"weight": BytesStorageMetadata()})], ids=["call", "bytes"]
)
def test_an_index_that_could_run_code_is_refused(
    world: World, folder: Path, tmp_path: Path, index: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can forge a checkpoint can forge its digests, too."""
    learner, checkpoints = Learner(policy(), folder, world), Checkpoints(tmp_path)
    checkpoints.save(1, learner, {})
    (tmp_path / "step-00001" / "learner" / ".metadata").write_bytes(pickle.dumps(index))
    step = tmp_path / "step-00001"
    (step / "files.json").write_text(json.dumps(digests(step, listed(step))))
    found = checkpoints.newest()
    assert found is not None
    ran: list[str] = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(SpellError, match=r"\.metadata"):
        load_learner(learner, found)
    assert ran == []


@pytest.mark.parametrize(
    ("kind", "before", "after", "most"),
    [
        ("qwen3_tied", (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2}), 1.1),
        (
            "moe",
            (4, {"expert": 2}),
            (2, {"tensor": 2, "sequence": True}),
            2.0,
        ),  # whole rows, for a cut of columns
        ("moe", (2, {"pipeline": 2}), (2, {}), 1.1),
    ],
)
def test_the_layout_may_change_between_save_and_resume(
    kind: Kind,
    before: tuple[int, dict[str, int]],
    after: tuple[int, dict[str, int]],
    most: float,
    tmp_path: Path,
) -> None:
    """Not a bit of the state changes by that. And every rank keeps, writes and reads as many bytes as the planner
    says: a share of what its group has. Of a later checkpoint, which is damaged, all ranks digest a share and hear the
    same."""
    make_model(kind, tmp_path / "model", seed=1, initializer_range=0.1)
    saved_once = run_program(tmp_path, "save", *before)
    torn = damaged_copy(tmp_path / "checkpoints", before[0] - 1)
    found = [saved_once, run_program(tmp_path, "load", *after)]
    for saved, loaded in zip(*(one["sums"] for one in found), strict=True):
        assert loaded == pytest.approx(saved, rel=TOLERANCE)
    first, second = (whole_tensors(tmp_path / name) for name in ("checkpoints", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for one, (world, layout) in zip(found, (before, after), strict=True):
        planned = planned_bytes(tmp_path / "model", LayoutConfig(**layout), world)
        assert max(rank["staged"] for rank in one["ranks"]) == pytest.approx(planned, rel=0.1)
    assert 0.9 <= max(rank["read"] for rank in found[1]["ranks"]) / planned <= most
    files = listed(tmp_path / "checkpoints/step-00001")
    one, other = (set(rank["digested"]) for rank in found[1]["ranks"])
    assert one | other == {f"{step}/{name}" for step in ("step-00001", torn.name) for name in files}
    assert not one & other
    assert sum(name.endswith(".distcp") for name in other) == before[0]  # half of each of two
    [said] = {rank["refused"] for rank in found[1]["ranks"]}
    assert said == f"{torn} is not whole: learner/__{before[0] - 1}_0.distcp is damaged"


def listed(checkpoint: Path) -> dict[str, str]:
    """Digests by name."""
    found: dict[str, str] = json.loads((checkpoint / "files.json").read_text())
    return found


def damaged_copy(checkpoints: Path, rank: int) -> Path:
    """Step 1 as step 2, with another bit in the middle of a rank's file."""
    copy = checkpoints / "step-00002"
    shutil.copytree(checkpoints / "step-00001", copy)
    flip(copy / f"learner/__{rank}_0.distcp")
    return copy


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def whole_tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(checkpoints).newest()
    assert found
    index, tensors = read_index(found.learner), {}
    for key, tensor in index.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        size = tuple(tensor.size)
        data = tensors[key] = torch.empty(size, dtype=tensor.properties.dtype)
        read_parts(found.learner, index, [TensorPart(key, size, Box((0,) * len(size), size), data)])
    return tensors


def planned_bytes(folder: Path, layout: LayoutConfig, size: int) -> int:
    """Of the busiest rank."""
    shape = model_shape(folder)
    policy, world = PolicyConfig(dtype="float32", layout=layout), check_layout(layout, shape, size)
    return max(saved_bytes(part, policy, world) for part in stage_parameters(shape, layout))


def run_program(folder: Path, mode: str, world: int, layout: dict[str, int]) -> dict[str, Any]:
    """Log-prob sums after each of the next two updates and sizes of the state, from ranks of reshard.py."""
    command = [
        *python("launchers.ranks", str(world)), "-W", "ignore",
        str(SUPPORT / "reshard.py"), mode, str(folder), json.dumps(layout),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / f"{mode}.json").read_text(encoding="utf-8"))
    return found
