"""Ranks and two vLLM servers on their devices: after every resync their log-probs are the learner's."""

from __future__ import annotations

import json
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import resync_fleet
from models import Kind, make_model

from spell_megatron.base.interpreter import python

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KINDS: dict[int, tuple[Kind, ...]] = {2: ("qwen3_tied", "moe"), 4: ("moe",)}
"""By the number of ranks: dense with one matrix for embedding and head, experts with two."""
TOLERANCE = 1e-4
IN_TIME = resync_fleet.SETTINGS.servers.sync_seconds + 10 + 20
"""With the grace that a worker has, and what a machine that is busy adds."""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resync")


@pytest.fixture(scope="module")
def rows(scratch: Path) -> list[dict[str, Any]]:
    rows = []
    for ranks, kinds in KINDS.items():
        out = scratch / str(ranks) / "rows.json"
        models = [f"{kind}={make_model(kind, out.parent / f'model-{kind}', seed=3)}" for kind in kinds]
        command = python("launchers.ranks", str(ranks))
        done = subprocess.run(
            [*command, resync_fleet.__file__, str(out), *models], capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-10000:]
        rows += [{"ranks": ranks, **row} for row in json.loads(out.read_text(encoding="utf-8"))]
    return rows


def of_layouts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those of resyncs in which a server was hurt."""
    return [row for row in rows if row["layout"] in resync_fleet.LAYOUTS[row["ranks"]]]


def test_both_servers_follow_every_step_of_every_layout(rows: list[dict[str, Any]]) -> None:
    places = [(row["ranks"], row["kind"], row["layout"], row["step"]) for row in of_layouts(rows)]
    assert places == [
        (ranks, kind, layout, step)
        for ranks, kinds in KINDS.items()
        for kind, layout, step in product(kinds, resync_fleet.LAYOUTS[ranks], range(resync_fleet.STEPS + 1))
        if kind == "moe" or not layout.startswith("ep")
    ]
    for row in of_layouts(rows):
        assert row["held"] == [row["version"]] * 2, row


def test_logprobs_are_the_learners_after_every_resync(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 0 < row["gap"] <= TOLERANCE, row


def test_old_weights_would_have_shown(rows: list[dict[str, Any]]) -> None:
    for row in of_layouts(rows):
        assert row["step"] == 0 or row["stale"] > 100 * TOLERANCE, row


def test_a_server_that_is_hurt_in_a_resync_holds_up_nobody(rows: list[dict[str, Any]]) -> None:
    hurt = {row["layout"]: row for row in rows if row not in of_layouts(rows)}
    assert list(hurt) == [*resync_fleet.FAULTS, "recovered"]
    stopped, killed, recovered = hurt.values()
    assert stopped["held"] == [stopped["version"], None]
    assert killed["held"][0] is None
    assert (
        killed["sent"] > 1 or killed["held"][1] == killed["version"]
    )  # its neighbour was back, or waited for
    assert recovered["held"] == [recovered["version"]] * 2
    assert max(stopped["seconds"], killed["seconds"]) <= IN_TIME


def test_every_server_has_a_log(rows: list[dict[str, Any]], scratch: Path) -> None:
    assert rows
    for ranks, kinds in KINDS.items():
        for kind, number in product(kinds, range(2)):
            assert (scratch / str(ranks) / kind / f"engine-{number}.log").stat().st_size
