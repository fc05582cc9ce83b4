"""A user's own object by its import path: what is named is what is got, and a wrong path says what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spell_megatron.base.imports import imported
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit

SOURCE = """
import json

class Needy(dict):
    def __init__(self, wanted): super().__init__()

class Table(dict): ...
table = Table(rows=1)
number = 3
def function(): return 7
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "strangers_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "tasks.py").write_text(SOURCE)
    (folder / "broken.py").write_text("1 / 0")
    (folder / "needs.py").write_text("import a_module_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)


def test_an_object_and_a_class_are_found() -> None:
    assert imported("strangers_package.tasks:table", dict, "tasks") == {"rows": 1}
    made = imported("strangers_package.tasks:Table", dict, "tasks")
    assert type(made).__name__ == "Table" and not made
    assert imported("strangers_package.tasks:function", Callable, "losses")() == 7  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("path", "said"),
    {
        "strangers_package.tasks": "is no import path: write package.module:Name",
        "strangers_package/tasks.py:Table": "is no import path",
        "strangers_package.tasks:Table()": "is no import path",
        "strangers_package.tasks:table.rows": "is no import path",
        "": "is no import path",
        "..tasks:Table": "is no import path",
        "nobodys_package.tasks:Table": "there is no module 'nobodys_package'; install",
        "strangers_package.task:Table": "there is no module 'strangers_package.task'",
        "strangers_package.needs:Table": "importing strangers_package.needs fails.*'a_module_nobody_has'",
        "strangers_package.broken:Table": "importing strangers_package.broken fails with ZeroDivisionError",
        "strangers_package.tasks:Tabel": "has no 'Tabel'; did you mean 'Table'",
        "strangers_package.tasks:number": "is of type int, and what belongs here is of type builtins:dict",
        "strangers_package.tasks:json": "is of type module",
        "pathlib:Path": "is the class Path, and what belongs here",
        "strangers_package.tasks:Needy": "cannot be made without arguments.*'wanted'",
    }.items(),
)
def test_a_wrong_path_says_what_is_wrong(path: str, said: str) -> None:
    with pytest.raises(SpellError, match=f"^model.families: {re.escape(repr(path))}.*{said}"):
        imported(path, dict, "model.families")
