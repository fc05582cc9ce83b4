"""The ways into the code in CONTRIBUTING.md: its files and names are there, its picture is what the rules say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from imports import ROOT, syntax
from test_house import FLOORS

pytestmark = pytest.mark.unit

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| `(.+?)` \| `(\w+)` \| (.*) \|$", PAGE, re.M)


@pytest.mark.parametrize(("what", "file", "name"), [row[:3] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_named_file_holds_the_name(what: str, file: str, name: str) -> None:
    assert name in names(ROOT / file)


def test_every_row_is_looked_up() -> None:
    table = PAGE.partition("## Where")[2].partition("\n## ")[0]
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == len(ROWS) + 2
    for wanted in (
        "reward",
        "prompt",
        "loss",
        "advantage",
        "task",
        "role",
        "family",
        "benchmark",
        "recipe",
        "cluster",
    ):
        assert any(wanted in row[0] for row in ROWS), wanted


def test_other_files_that_it_names_are_there() -> None:
    told = re.findall(r"`((?:[\w-]+/)+[\w.-]*)`|\]\(([\w/.-]+)\)", PAGE)
    for path in {code or link for code, link in told}:
        assert (ROOT / path).exists() or (ROOT / "spell_megatron" / path).exists(), path


def test_the_picture_has_the_floors_of_the_house() -> None:
    picture = re.findall(r"^    ([\w &]+) --> ([\w &]+)$", PAGE, re.M)
    drawn = [set(picture[0][1].split(" & ")), *(set(upper.split(" & ")) for upper, _ in picture)]
    floors = [{name.removeprefix("spell_megatron.").replace(".", "_") for name in floor} for floor in FLOORS]
    assert drawn == [{"ground"}, *floors[1:]]
    assert [set(lower.split(" & ")) for _, lower in picture] == drawn[:-1]


def names(path: Path) -> set[str]:
    """What a module defines, or the keys of a YAML file's first level."""
    if path.suffix != ".py":
        return set(re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.M))
    found = set[str]()
    for node in syntax(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        found.update(target.id for target in targets if isinstance(target, ast.Name))
    return found
