"""A model folder is data: code that it brings along is not run, and nobody is asked whether it should be."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from spell_megatron.weights.files import write_model
from tokenizer.chat import ChatTokenizer

pytestmark = pytest.mark.unit


def test_a_link_of_a_folder_takes_nothing_of_this_machine_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is exported is published; a folder that was cloned may hold links. Those of the hub's cache are its own."""
    (tmp_path / "credentials").write_text("SECRET")
    cache = tmp_path / "hub" / "models--a--b"
    for folder in ("blobs", "snapshots/1f"):
        (cache / folder).mkdir(parents=True)
    (cache / "blobs" / "9c").write_text("words")
    (tmp_path / "base").mkdir()
    for name in ("merges.txt", "generation_config.json"):
        (tmp_path / "base" / name).write_text("{}")
    snapshot, folder = cache / "snapshots" / "1f", tmp_path / "model"
    folder.mkdir()
    for source in (folder, snapshot):
        (source / "config.json").write_text("{}")
        (source / "vocab.txt").symlink_to(tmp_path / "credentials")
        (source / "merges.txt").symlink_to(
            tmp_path / "base" / "merges.txt"
        )  # as one links those of a base model
        (source / "generation_config.json").symlink_to(tmp_path / "base" / "generation_config.json")
        (source / "tokenizer.json").symlink_to(cache / "blobs" / "9c")
        (source / "chat_template.jinja").symlink_to("config.json")
        with caplog.at_level(logging.WARNING):
            write_model(tmp_path / "out", [], source=source, config={}, write=True)
        found = {path.name for path in (tmp_path / "out").iterdir()}
        assert found >= {"chat_template.jinja", "config.json", "tokenizer.json", "merges.txt"}
        assert not {"vocab.txt", "generation_config.json"} & found
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "words"
        assert "vocab.txt" in caplog.text
        caplog.clear()


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
