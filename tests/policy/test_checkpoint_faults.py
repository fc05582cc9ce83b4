"""File systems that stumble: no committed checkpoint is lost, and none is begun again from nothing.

A shim under `open` and the functions of `os` lets the k-th call fail, for every k, through a resume, a save and the
retention after it. What torch would write is a small file here; everything else is the product's.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stumbling import stumbling

from spell_megatron.policy.checkpoint import commit, files
from spell_megatron.policy.checkpoint import folder as disk
from spell_megatron.policy.checkpoint.files import digests
from spell_megatron.policy.checkpoint.search import dealt
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit

ERRORS = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EACCES)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here


def save(folder: Path, step: int, known: disk.Whole | None = None) -> None:
    """What `Checkpoints.save` does, with a learner of one file."""
    partial = disk.partial(folder, step)
    disk.begin(partial, step, {"at": step})
    learner = disk.learner_folder(partial)
    with open(learner / "__0_0.distcp", "wb") as file:
        file.write(bytes([step]) * 100)
        os.fsync(file.fileno())
    disk.commit(partial, digests(learner, {"__0_0.distcp"}))
    disk.retain(folder, step, last=2, every=0, known=known)


def cycle(folder: Path) -> int:
    """A process of the run: takes the newest state, settles, makes one step more. Returns where it began."""
    holder = commit.Checkpoints(folder)
    found = holder._chosen(None)
    if isinstance(found, SpellError):
        raise found
    fault = holder._settled(found, None)
    if fault is not None:
        raise fault
    start = found.step if found else 0
    save(folder, start + 1, holder._whole)
    return start


def intact(folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole and count."""
    whole = []
    for step, path in disk.committed(folder):
        try:
            disk.verified(path)
        except SpellError:
            continue
        whole.append(step)
    return whole


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 3 and 4, and a damaged one of step 5."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints"
    folder.mkdir()
    for step in range(1, 5):
        save(folder, step)
    shutil.copytree(folder / "step-00004", folder / "step-00005")
    (folder / "step-00005/learner/__0_0.distcp").write_bytes(b"torn")
    return run


def copied(before: Path, place: Path) -> Path:
    shutil.copytree(before, place)
    return place / "checkpoints"


@pytest.mark.parametrize(
    ("code", "lasting"),
    [*((code, False) for code in ERRORS), (errno.EIO, True)],
    ids=lambda value: f"{value}",
)
def test_whatever_call_fails_nothing_is_lost(before: Path, tmp_path: Path, code: int, lasting: bool) -> None:
    with stumbling(tmp_path, lambda _: False) as shim:
        cycle(copied(before, tmp_path / "smooth"))
    ended = 0
    for number in range(1, shim.calls + 1):
        folder = copied(before, tmp_path / f"{number}")
        failing = range(number, 1 << 30) if lasting else range(number, number + 1)
        with stumbling(tmp_path, failing.__contains__, code):
            try:
                start = cycle(folder)
            except (OSError, SpellError):
                ended += 1
            else:
                assert start == 4, f"call {number}: began after step {start}"
        assert 4 in intact(folder), f"call {number}: the newest whole checkpoint is lost"
        assert len(intact(folder)) >= 2, f"call {number}: fewer checkpoints than are kept"
        assert cycle(folder) in (4, 5), f"call {number}: the run did not go on"
        shutil.rmtree(folder.parent)
    assert shim.calls > 100
    assert ended > shim.calls / 3


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_what_cannot_be_read_is_neither_skipped_nor_damaged(before: Path, tmp_path: Path, code: int) -> None:
    folder = copied(before, tmp_path / "run")
    (folder / "step-00005").rename(tmp_path / "away")
    with (
        stumbling(folder / "step-00004", lambda _: True, code),
        pytest.raises(disk.UnreadableError, match=r"step-00004 cannot be read.*--from step-N.*--restart"),
    ):
        disk.newest(folder)
    assert names(folder) == ["step-00003", "step-00004"]


def test_it_is_read_again_until_it_can_be(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    folder = copied(before, tmp_path / "run")
    with stumbling(folder, lambda number: number < 40, errno.ESTALE):
        found = disk.newest(folder)
    assert found is not None and found.step == 4


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_all_damaged_ends_with_what_was_seen_of_each(before: Path, tmp_path: Path) -> None:
    folder = copied(before, tmp_path / "run")
    for path in folder.glob("step-0000?/learner/*"):
        path.write_bytes(b"torn")
    kept = names(folder)
    with pytest.raises(disk.DamagedError) as fault:
        disk.newest(folder)
    assert fault.value.exit_code == 2
    for said in (*(f"step-0000{step} is not whole: learner/__0_0.distcp is damaged" for step in (3, 4, 5)),):
        assert said in str(fault.value)
    assert "--from step-N" in str(fault.value) and "--restart" in str(fault.value)
    assert names(folder) == kept


def test_a_disk_that_is_not_there_is_not_an_empty_one(before: Path, tmp_path: Path) -> None:
    run = copied(before, tmp_path / "run").parent
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SpellError, match=r"it is a link to .*nowhere, which is not there"):
        disk.newest(run / "checkpoints")
    (run / "checkpoints").unlink()
    for mount in (False, True):
        if mount:
            (run / "checkpoints").mkdir()
        with pytest.raises(SpellError, match="holds no checkpoint, and one of step 4 was committed there"):
            disk.newest(run / "checkpoints")
    assert disk.newest(tmp_path / "another") is None


def test_one_may_go_on_from_another_or_begin_again(before: Path, tmp_path: Path) -> None:
    folder = copied(before, tmp_path / "run")
    holder = commit.Checkpoints(folder)
    with pytest.raises(SpellError, match="no checkpoint of step 9; there are: step-3, step-4, step-5"):
        raise holder._chosen(9)  # type: ignore[misc]
    found = holder._chosen(3)
    assert isinstance(found, disk.Checkpoint)
    holder._settled(found, 3)
    assert [name for name in names(folder) if "suspect" not in name] == ["step-00003"]
    assert holder._chosen(0) is None
    holder._settled(None, 0)
    assert len(names(folder)) == 3
    assert all("suspect" in name for name in names(folder))
    assert disk.newest(folder) is None


def test_only_whole_ones_count_and_none_is_removed(before: Path, tmp_path: Path) -> None:
    """A checkpoint that is damaged after its commit does not crowd out the last whole one."""
    folder, known = copied(before, tmp_path / "run"), disk.Whole()
    save(folder, 5, known)
    (folder / "step-00005/run.json").write_text("{}")
    save(folder, 6, known)
    assert intact(folder) == [4, 6]
    assert [name for name in names(folder) if "00005" in name] == [f"step-00005.suspect-{n}" for n in (1, 2)]


def test_what_is_known_of_checkpoints_does_not_grow_with_them(before: Path, tmp_path: Path) -> None:
    folder, known = copied(before, tmp_path / "run"), disk.Whole()
    for step in range(6, 30):
        save(folder, step, known)
    assert set(known._seen) == {folder / "step-00028", folder / "step-00029"}


def test_a_step_that_was_committed_under_another_spelling_does_not_count_twice(
    before: Path, tmp_path: Path
) -> None:
    folder = copied(before, tmp_path / "run")
    (folder / "step-00005").rename(tmp_path / "away")
    (folder / "step-00004").rename(folder / "step-4")
    save(folder, 4)
    assert names(folder) == ["step-00003", "step-00004", "step-4.suspect-1"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "run.json").write_text("[" * 100_000),
        lambda step: rewritten(step, "run.json", "[" * 100_000),
        lambda step: rewritten(step, "run.json", '{"step": "4"}'),
        lambda step: rewritten(step, "run.json", '{"step": 7, "run": {}}'),
        lambda step: (step / "files.json").write_text('{"../../secret": "0", "run.json": "0"}'),
        lambda step: (step / "files.json").write_text('["run.json"]'),
        lambda step: ((step / "run.json").unlink(), os.mkfifo(step / "run.json")),
        lambda step: ((step / "files.json").unlink(), os.mkfifo(step / "files.json")),
        lambda step: ((step / "run.json").unlink(), (step / "run.json").symlink_to("/dev/zero")),
        lambda step: ((step / "run.json").unlink(), (step / "run.json").mkdir()),
        lambda step: (shutil.rmtree(step), step.write_text("a file")),
    ],
)
def test_whatever_is_no_checkpoint_is_damaged(
    before: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = copied(before, tmp_path / "run")
    damage(folder / "step-00004")
    with pytest.raises(disk.DamagedError, match=r"step-00004 is not whole"):
        disk.verified(folder / "step-00004")
    found = disk.newest(folder)
    assert found is not None and found.step == 3


@given(st.integers(1, 24), st.integers(1, 24))
def test_every_file_is_digested_by_one_rank_its_own_where_it_is_there(writers: int, ranks: int) -> None:
    files = [f"learner/__{rank}_0.distcp" for rank in range(writers)]
    names = {*files, "run.json", "learner/.metadata", "learner/common.pt"}
    shares = dealt(names, ranks)
    assert sorted(name for share in shares for name in share) == sorted(names)
    tensors = [[name for name in share if name in files] for share in shares]
    assert all(len(share) <= math.ceil(writers / ranks) for share in tensors)
    if writers == ranks:
        assert tensors == [[file] for file in files]
    busy = [rank for rank, share in enumerate(tensors) if share]
    assert all(b - a >= ranks // writers for a, b in pairwise(busy)), "spread over the nodes"


def rewritten(step: Path, name: str, text: str) -> None:
    """A file with another text and the digest of that."""
    (step / name).write_text(text)
    listed = json.loads((step / "files.json").read_text())
    (step / "files.json").write_text(json.dumps(digests(step, listed)))
