"""Rollouts that overlap with training, on a real server: their age, a stop in the middle of a step, and the resume.

`launch` starts two ranks that share every layer, and `resume` as many.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from itertools import pairwise
from typing import Any

import psutil
import pytest

from spell_megatron.base.interpreter import python
from spell_megatron.run.preemption import Preempted
from spell_megatron.run.record import RunFolder, read_metrics

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

CLI = python("spell_megatron.tools.cli")
OVERLAPPED = (
    "selfplay.max_staleness=1",
    "selfplay.leftovers=carry",
    "policy.loss.importance_cap=2.0",
    "record.mismatch_bound=5.0",
    "rollout.servers.count=1",
    "rollout.servers.in_flight=continue",
    "selfplay.questions=4",
    "selfplay.round_questions=16",
    "selfplay.max_rounds=8",
    "selfplay.group_size=4",
    "heldout.questions=0",
    "record.checkpoint_every=1",
    "rollout.kv_cache_mib=64",
    "corpus.toy_clusters=6",
)
MORE = 2
"""Steps of the resumed run."""
PATIENCE = 300
"""Seconds after which what should happen has not."""


def checkpoint(run: RunFolder) -> int:
    return max((int(path.name[-5:]) for path in run.checkpoints.glob("step-?????")), default=0)


def episodes(run: RunFolder, step: int) -> list[dict[str, Any]]:
    path = run.rollouts(step)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def rollouts(episode: dict[str, Any]) -> list[dict[str, Any]]:
    judgements = [j for response in episode["responses"] for j in response["judgements"]]
    made = [one["rollout"] for one in (*episode["responses"], *judgements)]
    return made + ([episode["asked"]] if episode["asked"] else [])


def versions(episode: dict[str, Any]) -> set[int]:
    made = rollouts(episode)
    return {r["version"] for r in made} | {version for r in made for _, version in r["updates"]}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A launched run that is told to end after its second step, while the next one is being played."""
    runs = tmp_path_factory.mktemp("overlapped")
    command = [*CLI, "launch", "toy", *OVERLAPPED, "policy.layout.tensor=2", "steps=50", f"runs={runs}"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    deadline = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline and process.poll() is None:
            found = [RunFolder(path) for path in runs.glob("toy-*") if (path / "checkpoints").is_dir()]
            if found and (step := checkpoint(found[0])) >= 2 and episodes(found[0], step + 1):
                family = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                break
            time.sleep(0.2)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == Preempted.exit_code, errors
    assert f"stopped on SIGTERM after step {checkpoint(found[0])}; everything is saved" in errors
    assert len(family) > 2, "two ranks, and the server of one"
    assert not psutil.wait_procs(family, PATIENCE)[1]
    return found[0]


@pytest.fixture(scope="module")
def resumed(stopped: RunFolder) -> tuple[RunFolder, int, int]:
    """The run with `MORE` steps, the last step before them, and the episodes that these found finished."""
    last = checkpoint(stopped)
    found = {(row["round"], row["index"]) for row in episodes(stopped, last + 1)}
    command = [*CLI, "resume", str(stopped.path), f"steps={last + MORE}"]
    command += ["record.mismatch_action=drop"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    return stopped, last, len(found)


def test_no_sample_is_older_than_the_bound_and_some_are_old(resumed: tuple[RunFolder, int, int]) -> None:
    run, last, _ = resumed
    for step in range(1, last + MORE + 1):
        made_by = set().union(*map(versions, episodes(run, step)))
        assert made_by <= {step - 2, step - 1} - {-1}
    rows = read_metrics(run)[1:]
    assert max(row["staleness/max"] for row in rows) == 1.0
    assert rows[0]["staleness/mean"] == 0.0 < rows[1]["staleness/mean"] <= 1.0
    assert rows[0]["importance/weight"] == pytest.approx(1.0, abs=1e-3)
    assert rows[last + 1]["staleness/mean"] > 0.0, "nothing overlaps after the resume"
    fresh, stale = rows[0]["mismatch/mean"], rows[1]["mismatch/mean"]
    assert stale > 10 * fresh, "an update makes no difference to the log-probs: the test cannot fail"


def test_every_step_is_made_once_and_counts_add_up(resumed: tuple[RunFolder, int, int]) -> None:
    run, last, _ = resumed
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(last + MORE + 1))
    for row in rows[1:]:
        came = sum(row[f"episodes/{name}"] for name in ("begun", "brought", "journaled"))
        went = sum(row[f"episodes/{name}"] for name in ("used", "aborted", "unused", "carried", "expired"))
        assert came == went
    for before, after in pairwise(rows[1:]):
        resumed_here = after["step"] == last + 1  # which brings nothing along
        assert after["episodes/brought"] == (0 if resumed_here else before["episodes/carried"])


def test_what_was_played_ahead_is_not_played_again(resumed: tuple[RunFolder, int, int]) -> None:
    """The state of self-play in a checkpoint is that between two plays, though the next was under way."""
    run, last, found = resumed
    assert read_metrics(run)[last + 1]["episodes/journaled"] == found
