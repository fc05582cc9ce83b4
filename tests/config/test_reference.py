"""The reference of keys says what the schema says, and what it says can be written."""

from __future__ import annotations

import re
from typing import Any

import pytest
from places import ROOT

from spell_megatron.config import Config, ConfigError
from spell_megatron.config.reading import build, override
from spell_megatron.config.reference import reference

pytestmark = pytest.mark.unit

PAGE = ROOT / "docs" / "reference.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (?:empty|`(.+?)`) \| (.*) \|$")


def keys() -> list[tuple[str, str, str | None, str]]:
    """Path, values, default and meaning of every key outside of lists, as the page has them."""
    found, section = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = "" if line == "## A run" else line.removeprefix("## ") + "."
        elif (row := ROW.match(line)) and "[]" not in section:
            found.append((section + row[1], row[2], row[3], row[4]))
    return found


def test_the_page_is_what_the_schema_says() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == reference() + "\n", "run: spell-megatron config > docs/reference.md"


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [line for line in rows if not (row := ROW.match(line)) or not row[4]] == []


def test_defaults_can_be_written_as_they_stand() -> None:
    values: dict[str, Any] = {}
    for path, _, default, _ in keys():
        if default is not None:
            override(Config, values, f"{path}={default}")
    assert build(Config, values, "the page") == Config()


def test_bounds_are_those_that_hold() -> None:
    bounds = [
        (path, sign, int(bound))
        for path, kinds, *_ in keys()
        for sign, bound in re.findall(r"([>≥<≤]) (\d+)", kinds)
        if " of" not in kinds
    ]
    assert {sign for _, sign, _ in bounds} == {">", "≥", "<", "≤"}
    for path, sign, bound in bounds:
        if sign in "≥≤":
            taken(path, bound)
        with pytest.raises(ConfigError, match=re.escape(path)):
            taken(path, {"≥": bound - 1, "≤": bound + 1}.get(sign, bound))


def taken(path: str, value: int) -> None:
    values: dict[str, Any] = {}
    override(Config, values, f"{path}={value}")
    build(Config, values, "the bound")


def test_one_section_and_those_inside_it() -> None:
    assert re.findall("^## (.+)", reference("policy.loss"), re.M) == ["policy.loss"]
    inside = re.findall("^## (.+)", reference("corpus"), re.M)
    assert inside == ["corpus", "corpus.sources[]"]
    with pytest.raises(ConfigError, match=r"did you mean 'policy\.loss'"):
        reference("policy.los")
