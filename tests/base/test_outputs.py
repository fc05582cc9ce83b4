"""Nothing of the user's is deleted: a command writes a folder of its own, whole, or leaves what is there alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spell_megatron.base.outputs import MARKER, check_output, make_room, new_folder
from spell_megatron.tools.convert import export_hf, import_hf
from spell_megatron.tools.warmup import make_seed_model
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit


def write(out: Path, text: str, name: str = "sub/model") -> None:
    with new_folder(out, "model") as folder:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_an_empty_and_an_own_folder_are_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out, "one")
    write(out, "two", "other")
    assert tree(out).keys() == {"other", MARKER}
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "three")
    assert (tmp_path / "empty/sub/model").read_text() == "three"
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("where", ["thesis.tex", "sub/notes", ".hidden"])
def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, where: str) -> None:
    for own in (False, True):
        out = tmp_path / str(own)
        if own:
            write(out, "one")
        (out / where).parent.mkdir(parents=True, exist_ok=True)
        (out / where).write_text("years of work")
        before = tree(out)
        with pytest.raises(SpellError, match=f"{where} was not written by this command: nothing was changed"):
            write(out, "two")
        assert tree(out) == before
        assert sorted(os.listdir(tmp_path)) == sorted({"False", str(own)})


def test_a_file_an_empty_folder_within_and_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "nest" / "empty").mkdir(parents=True)
    write(tmp_path / "model", "one")
    for out, kind in (("file", "model"), ("nest", "model"), ("model", "import")):
        with pytest.raises(SpellError, match="nothing was changed"):
            check_output(tmp_path / out, kind)  # type: ignore[arg-type]


def test_a_file_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "one")

    def meanwhile() -> None:
        with new_folder(out, "model"):
            (out / "late").write_text("work")

    with pytest.raises(SpellError, match="late"):
        meanwhile()
    assert tree(out)["late"] == "work"
    assert tree(out)["sub/model"] == "one"
    assert os.listdir(tmp_path) == ["out"]


def test_a_fault_leaves_the_earlier_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "one")
    with pytest.raises(OSError), new_folder(out, "model"):
        raise OSError("disk")
    assert tree(out)["sub/model"] == "one"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_stays_and_its_folder_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/sub/model").read_text() == "one"


def test_every_command_refuses_before_it_works(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a run")
    for work in (
        lambda: import_hf(tmp_path / "model", tmp_path),
        lambda: export_hf(tmp_path / "run", tmp_path),
        lambda: make_seed_model(tmp_path),
    ):
        with pytest.raises(SpellError, match=r"config\.yaml was not written by this command"):
            work()
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_run_makes_room_for_its_model(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    write(hf, "one")
    make_room(hf, "model")
    assert os.listdir(tmp_path) == ["hf"]
    (hf / "notes").write_text("mine")
    make_room(hf, "model")
    assert os.listdir(tmp_path) == ["hf.kept-1"]
