"""The first hour on a GPU, on the CPU: every check passes here too, and none of them takes the others along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checks import follow
from benchmarks.gpu_check import PARTS

REPORTS = """
import os, sys, time
from benchmarks.checks import report

def fails(): raise ValueError("no good")
def dies(): os._exit(7)
def hangs(): time.sleep(600)

ends = {"dies": dies, "hangs": hangs}
report([("first", fails), ("second", lambda: {"x": 1.5}), ("third", ends[sys.argv[1]]), ("fourth", fails)])
"""


@pytest.mark.unit
def test_a_part_that_dies_leaves_the_rows_that_it_had() -> None:
    first, second, rest = follow([sys.executable, "-c", REPORTS, "dies"], "it", 60)
    assert (first.check, first.fault) == ("first", "ValueError: no good")
    assert (second.check, second.fault, second.figures) == ("second", "", {"x": 1.5})
    assert rest.check == "the rest of it" and "code 7" in rest.fault


@pytest.mark.unit
def test_a_part_that_hangs_is_ended() -> None:
    *_, second, rest = follow([sys.executable, "-c", REPORTS, "hangs"], "it", 8)
    assert not second.fault
    assert "not through in time" in rest.fault


@pytest.mark.unit
def test_all_parts_together_take_ten_minutes_at_most() -> None:
    assert sum(part.limit for part in PARTS.values()) <= 600


@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_every_check_passes_on_a_cpu(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--json", "--write", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1190)
    found = json.loads(done.stdout.splitlines()[-1])
    rows = {row["check"]: row for row in found["rows"]}
    assert not [row for row in rows.values() if row["fault"]], found
    assert done.returncode == 0
    assert found["device"] == "a CPU" and not page.exists(), "no page claims a GPU that was not there"
    assert rows["three updates reach it"]["figures"]["before a resync"] > 0.1
    assert {
        "doctor",
        "sleep and wake",
        "killed while it answers",
        "three steps of the toy recipe",
    } <= rows.keys()
