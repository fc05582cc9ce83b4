"""The table of ablations: what is run, what is kept, and the figures' arithmetic."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import typer

from benchmarks import ablations
from spell_megatron.config import load_config
from spell_megatron.corpus.toy import TASKS
from spell_megatron.run.record.folder import read_lines
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit


def scores(value: float) -> dict[str, Any]:
    return {"mean": value, "by_task": dict.fromkeys(TASKS, value)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Runs that were asked for; a run ends at 0.6 + seed/10, without memory at 0.1 less."""
    made: list[tuple[int, tuple[str, ...]]] = []

    def run(seed: int, overrides: list[str]) -> dict[str, Any]:
        made.append((seed, tuple(overrides)))
        after = 0.6 + seed / 10 - 0.1 * ("selfplay.memory=0" in overrides)
        return {"heldout_before": scores(0.5), "heldout_after": scores(after), "generated": 1e6, "more": 1}

    monkeypatch.setattr(ablations, "run", run)
    return made


def results(names: list[str], seeds: int, overrides: list[str], kept: Path) -> list[dict[str, Any]]:
    rows, failed = ablations.kept_results(names, seeds, overrides, kept, ablations.VARIANTS, ablations._run)
    assert not failed
    return rows


def test_every_variant_is_a_configuration() -> None:
    configs = {name: load_config("toy", overrides) for name, overrides in ablations.VARIANTS.items()}
    assert len(set(map(repr, configs.values()))) == len(configs)
    static = configs["static"].selfplay
    assert static.static_questions
    assert not static.judge
    with pytest.raises(SpellError, match="no variant 'nothing'; there are: spell, no-memory"):
        ablations.chosen("spell,nothing")


def test_what_is_over_is_not_run_again(asked: list[object], tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    first = results(["spell"], 2, ["steps=1"], kept)
    assert asked == [(0, ("steps=1",)), (1, ("steps=1",))]
    again = results(["spell", "no-memory"], 2, ["steps=1"], kept)
    assert asked[2:] == [(0, ("selfplay.memory=0", "steps=1")), (1, ("selfplay.memory=0", "steps=1"))]
    assert [row for row in again if row["variant"] == "spell"] == first
    results(["spell"], 1, ["steps=2"], kept)
    assert asked[4:] == [(0, ("steps=2",))]


def test_runs_side_by_side_share_the_cores_and_leave_a_failed_one_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meeting, threads = Barrier(2), set[str]()

    def run(seed: int, overrides: Sequence[str]) -> dict[str, Any]:
        threads.add(os.environ["OMP_NUM_THREADS"])
        if seed == 1:
            raise SpellError("no [second] run")
        meeting.wait(20)  # both are under way
        return {"after": seed}

    kept = tmp_path / "kept.jsonl"
    rows, failed = ablations.kept_results(["spell"], 3, [], kept, ablations.VARIANTS, run, at_once=2)
    assert [row["after"] for row in rows] == [0, 2]
    assert failed == ["spell, seed 1: no [second] run"]
    assert sorted(row["seed"] for row in read_lines(kept)) == [0, 2]
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    ablations.tell([])
    with pytest.raises(typer.Exit) as ended:
        ablations.tell(failed)
    assert ended.value.exit_code == 1
    assert "no [second] run" in capsys.readouterr().err


@pytest.mark.usefixtures("asked")
def test_variants_are_compared_with_spell_seed_by_seed(tmp_path: Path) -> None:
    rows = results(["spell", "no-memory"], 3, [], tmp_path / "kept.jsonl")
    summary = ablations.summarise(rows)
    assert summary["spell"]["after"]["mean"] == pytest.approx(0.7)
    assert summary["spell"]["difference"]["doc_mc"]["mean"] == pytest.approx(0.2)
    assert summary["spell"]["difference"]["mean"]["half_width"] == pytest.approx(4.303 * 0.1 / 3**0.5)
    pair = summary["no-memory"]["against_spell"]
    assert (pair["mean"], pair["half_width"]) == (pytest.approx(-0.1), pytest.approx(0.0, abs=1e-9))
    one = ablations.summarise([row for row in rows if row["seed"] == 0])
    assert one["spell"]["difference"]["mean"]["half_width"] is None
