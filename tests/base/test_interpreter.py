"""A file in the folder where the user works is imported by no process of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import traps

from launchers import local, script
from launchers.job import PreparedRun
from launchers.machines import Machines
from launchers.profile import Profile
from spell_megatron.base import interpreter
from spell_megatron.base.bounded import Bounded
from spell_megatron.base.interpreter import ROOMS, ROOT, check_rooms, environment
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit

IMPORTS = (
    "import sys, types, random, json, logging; from spell_megatron.base.interpreter import check_rooms;"
    " check_rooms(); print(sys.argv[1])"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, full of traps."""
    monkeypatch.chdir(traps.lay(tmp_path / "work"))
    return Path.cwd()


def run(*words: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_trap_is_sprung_by_what_looks_into_the_working_folder(folder: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run([sys.executable, "-c", "import eval"], capture_output=True, text=True, env=bare)
    assert "a file of the user" in done.stderr
    assert traps.sprung(folder) == ["eval"]


def test_the_command_line_as_a_module(folder: Path) -> None:
    assert run(sys.executable, "-m", "spell_megatron.tools.cli", "prompts", "mine") == "mine\n"
    assert not traps.sprung(folder)


def test_the_command_line_as_it_is_installed(folder: Path) -> None:
    if not (entry := Path(sys.executable).with_name("spell-megatron")).exists():
        pytest.skip("this environment has no entry point: pip install -e .")
    assert run(str(entry), "prompts", "mine") == "mine\n"
    assert not traps.sprung(folder)


def test_what_the_command_line_starts_is_told(folder: Path) -> None:
    """Libraries start Python, too."""
    code = (
        "import subprocess, sys; from spell_megatron.tools import cli;"
        f"cli.app = lambda: sys.exit(subprocess.run([sys.executable, '-c', {IMPORTS!r}, 'safe']).returncode);"
        "cli.main()"
    )
    assert run(sys.executable, "-P", "-c", code) == "safe\n"


@pytest.mark.parametrize("count", [1, 2])
def test_ranks_on_this_machine(folder: Path, tmp_path: Path, count: int) -> None:
    job = PreparedRun(tmp_path, Profile(), Machines(ranks=count), trainer=("-c", IMPORTS))
    assert run(*local.command(job), env=environment()) == f"{tmp_path}\n"
    assert not traps.sprung(folder)


def test_ranks_and_engines_of_a_job(folder: Path, tmp_path: Path) -> None:
    on = Machines(nodes=2, servers=1)
    job = PreparedRun(tmp_path, Profile(), on, trainer=("-c", IMPORTS), engines=("-c", IMPORTS))
    for command in (script.rank_command(job), script.engine_command(job)):
        assert run("bash", "-c", command) == f"{tmp_path}\n"
    assert not traps.sprung(folder)


def test_work_in_a_process_of_its_own(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", ["", *sys.path])
        work = Bounded("os:getcwd", seconds=20, memory=1 << 30)
        assert work() == str(folder)
        work.close()
    assert not traps.sprung(folder)


def test_children_find_our_packages_where_this_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for inherited in ("", "/elsewhere", f"/elsewhere{os.pathsep}", f"/elsewhere{os.pathsep}{ROOT}"):
        monkeypatch.setenv("PYTHONPATH", inherited)
        path = environment()["PYTHONPATH"].split(os.pathsep)
        assert "" not in path and path.count(str(ROOT)) == 1
    monkeypatch.setattr(
        interpreter.sysconfig, "get_path", lambda _: str(ROOT)
    )  # among others that are installed
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert environment()["PYTHONPATH"] == "/elsewhere"


def test_children_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SPELL_RANKS_SECRET"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SPELL_API_KEY", "kept")
    found = environment()
    assert found["SPELL_API_KEY"] == "kept"
    assert not {name for name in found if "RANK" in name or name.startswith("TORCHELASTIC")}


@pytest.mark.parametrize("room", ROOMS[1:])
@pytest.mark.parametrize("kind", ["file", "package"])
def test_a_foreign_package_of_our_name_is_named(tmp_path: Path, room: str, kind: str) -> None:
    foreign = tmp_path / (f"{room}.py" if kind == "file" else f"{room}/__init__.py")
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("raise ImportError('a file of the user')")
    code = "from spell_megatron.tools.cli import main; main()"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "report", "run"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 1
    assert f"`{room}` is taken from {foreign}, not from {ROOT / room}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_room_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rooms()
    monkeypatch.setattr(interpreter, "find_spec", lambda _: None)
    with pytest.raises(SpellError, match="taken from nowhere"):
        check_rooms()
