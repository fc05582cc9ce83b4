"""A model folder is data: code that it brings along is not run, and nobody is asked whether it should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tokenizer.chat import ChatTokenizer

pytestmark = pytest.mark.unit


def test_code_of_a_folder_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    auto = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": auto}))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(Exception):  # noqa: B017 - whichever way the tokenizer says no
        ChatTokenizer.load(tmp_path)
    assert not ran.exists()
    assert not asked
