"""Two ranks under torchrun and two real vLLM servers: after every resync their log-probs are the learner's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resync_fleet
from models import Kind, make_model

pytestmark = pytest.mark.engine

KINDS: tuple[Kind, ...] = ("qwen3", "qwen3_tied", "moe")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resync")


@pytest.fixture(scope="module")
def rows(scratch: Path) -> list[dict[str, Any]]:
    models = [f"{kind}={make_model(kind, scratch / f'model-{kind}', seed=3)}" for kind in KINDS]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [resync_fleet.__file__, str(scratch / "rows.json"), *models]
    done = subprocess.run([*command, *program], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-10000:]
    rows: list[dict[str, Any]] = json.loads((scratch / "rows.json").read_text(encoding="utf-8"))
    return rows


def test_both_servers_follow_every_step_of_every_layout(rows: list[dict[str, Any]]) -> None:
    places = [(row["kind"], row["layout"], row["step"]) for row in rows]
    steps = range(resync_fleet.STEPS + 1)
    assert places == [
        (kind, layout, step) for kind in KINDS for layout in resync_fleet.LAYOUTS for step in steps
    ]
    for row in rows:
        assert row["held"] == [row["version"]] * 2, row


def test_logprobs_are_the_learners_after_every_resync(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 0 < row["gap"] <= TOLERANCE, row


def test_old_weights_would_have_shown(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["step"] == 0 or row["stale"] > 100 * TOLERANCE, row


def test_every_server_has_a_log(rows: list[dict[str, Any]], scratch: Path) -> None:
    assert rows
    for kind in KINDS:
        assert all((scratch / kind / f"engine-{i}.log").stat().st_size for i in range(2))
