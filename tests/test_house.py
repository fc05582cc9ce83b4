"""The house rules that a machine can check: who imports whom, what is importable without torch, what names are used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from imports import PACKAGES, ROOT, circles, imports, modules, syntax

import spell_megatron

pytestmark = pytest.mark.unit

FLOORS = (
    {"spell_megatron", "spell_megatron.types", "spell_megatron.base", "spell_megatron.config"},
    {"spell_megatron.selfplay", "spell_megatron.corpus", "megatron_patches", "tokenizer"},
    {"spell_megatron.weights", "spell_megatron.policy", "spell_megatron.rollout"},
    {"spell_megatron.policy.checkpoint", "spell_megatron.run.record", "spell_megatron.tools.plan"},
    {"spell_megatron.run", "spell_megatron.tools", "spell_megatron.tools.warmup"},
    {"eval", "launchers"},
    {"spell_megatron.tools.cli"},
)
"""Rooms, from the ground up. A room within another has a floor of its own where it is named."""
FORBIDDEN = {
    "spell_megatron.types": {"torch", "vllm", "megatron", "transformers"},
    "spell_megatron.config": {"torch", "vllm", "megatron", "transformers"},
    "spell_megatron.base": {"vllm", "megatron", "transformers"},
    "spell_megatron.base.registry": {"torch"},
    "spell_megatron.selfplay": {"torch", "vllm", "megatron", "transformers"},
    "spell_megatron.corpus": {"torch", "vllm", "megatron"},
    "spell_megatron.policy": {"vllm", "spell_megatron.selfplay"},
    "spell_megatron.rollout": {"megatron", "spell_megatron.selfplay", "spell_megatron.policy"},
}


def room(module: str) -> str | None:
    """The room of a module: the longest name on any floor that it lies in."""
    rooms = [name for floor in FLOORS for name in floor if _inside(module, name)]
    return max(rooms, key=len, default=None)


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize(("module", "path"), modules().items(), ids=modules())
def test_imports_run_one_way(module: str, path: Path) -> None:
    own = room(module)
    assert own, f"{module} belongs to no room: add it to the floors"
    for name in imports(path):
        other = room(name)
        if other and other != own and name.split(".")[0] in PACKAGES:
            assert floor(other) <= floor(own), f"{module} imports {name}, which lives upstairs"
    for root, banned in FORBIDDEN.items():
        if _inside(module, root):
            met = {name for name in imports(path) for other in banned if _inside(name, other)}
            assert not met, f"{module} must not import {met}"


def _inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Inside rooms, too. Imports for types and inside functions count: who reads one file has to know the other."""
    assert not circles()


def test_configuration_and_self_play_load_without_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'megatron', 'transformers'): sys.modules[name] = None\n"
        "import spell_megatron.config, spell_megatron.selfplay, spell_megatron.policy.layout\n"
        "spell_megatron.config.load_config('toy')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_types_of_a_package_are_told_to_those_who_import_it() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file(), package


def test_a_public_class_has_a_name_of_its_own() -> None:
    """One word, one thing, in all packages; inside a module a leading underscore is enough."""
    homes: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in syntax(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_the_version_stands_in_one_place_and_its_changes_are_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "spell_megatron.__version__"}
    versions = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions[0] == spell_megatron.__version__


def test_the_top_shelf_is_short() -> None:
    entries = {path.name for path in (ROOT / "spell_megatron").iterdir()} - {
        "__pycache__",
        "__init__.py",
        "py.typed",
    }
    assert len(entries) <= 10, entries


def test_the_loop_is_read_in_one_screen() -> None:
    assert len((ROOT / "spell_megatron" / "run" / "train.py").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_package_does_not_print() -> None:
    for module, path in modules().items():
        calls = [
            node.func.id
            for node in ast.walk(syntax(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert "print" not in calls, module
        assert "eval" not in calls, module
        assert "exec" not in calls, module
