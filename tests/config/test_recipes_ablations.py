"""Every ablation that docs/recipes.md lists is one key that changes a recipe."""

from __future__ import annotations

import re

import pytest
from places import ROOT

from spell_megatron.config import load_config

pytestmark = pytest.mark.unit
TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| [^|]+ \| `([\w.]+)=(\S+)` \| ([\d.]+) \|$", TEXT, re.MULTILINE)


def test_the_papers_ablations_are_all_there():
    assert len(ROWS) == 12
    assert all(40 < float(figure) < 47.2 for *_, figure in ROWS)


@pytest.mark.parametrize(("key", "value"), [row[:2] for row in ROWS])
def test_one_key_is_enough(key: str, value: str):
    assert load_config("paper-16k", [f"{key}={value}"]) != load_config("paper-16k")
