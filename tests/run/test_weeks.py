"""Ten thousand steps of what rank 0 keeps and writes: flat in memory, constant in work."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
import pytest

from benchmarks.weeks import KEPT, Weeks
from spell_megatron.config import RecordConfig
from spell_megatron.run.record import Archive, RunFolder
from spell_megatron.run.record.archive import kept_steps
from spell_megatron.selfplay.memory import Memory
from spell_megatron.types import Question

pytestmark = pytest.mark.unit

STEPS, EARLY = 10_000, 100


def test_ten_thousand_steps_are_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is counted, not timed: calls of functions, and bytes written. `benchmarks.weeks` has the seconds."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # this machine does not lose its power
    weeks, work, resident = Weeks(tmp_path), {EARLY: Counter[str](), STEPS: Counter[str]()}, 0
    for step in range(1, STEPS + 1):
        end = EARLY if step <= EARLY else STEPS
        if step > end - 10:  # the last of them makes a checkpoint
            with counted(work[end]):
                weeks.step(step)
            work[end]["bytes"] += weeks.run.rollouts(step).stat().st_size
        else:
            weeks.step(step)
        if step in work:
            work[step]["bytes"] += weeks.saved.stat().st_size
            work[step]["bytes"] += len(weeks.run.metrics.read_bytes().splitlines()[-1])
        if step == EARLY:
            resident = psutil.Process().memory_info().rss
    grown = psutil.Process().memory_info().rss - resident
    weeks.close()
    assert grown <= 50 << 20
    for kind in ("calls", "bytes"):
        assert 0 < work[STEPS][kind] <= 1.2 * work[EARLY][kind], (kind, work)
    assert weeks.run.recorded_steps == list(range(STEPS - KEPT + 1, STEPS + 1))


@contextmanager
def counted(work: Counter[str]) -> Iterator[None]:
    """Count the calls that the block makes, in Python and into C."""

    def called(frame: FrameType, event: str, argument: object) -> None:
        work["calls"] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(before)


def test_the_oldest_are_forgotten_first_by_count_and_by_age() -> None:
    memory = Memory(2, limit=4, age=10)

    def ask(cluster: str, step: int) -> None:
        memory.store("doc_mc", cluster, (0,), Question("doc_mc", f"{cluster} {step}", "A"), step)

    for step, cluster in enumerate("aabbac", start=1):
        ask(cluster, step)
    assert [bool(memory.recall("doc_mc", cluster)) for cluster in "abc"] == [True, False, True]
    assert len(memory) == 3
    again = Memory(2, limit=4, age=10)
    again.restore(json.loads(json.dumps(memory.state())))
    assert again.state() == memory.state()
    ask("d", 16)  # the last of `a` is 11 steps old, that of `c` 10
    assert [bool(memory.recall("doc_mc", cluster)) for cluster in "acd"] == [False, True, True]


@pytest.mark.parametrize("how", ["compress", "remove"])
def test_old_rollouts_are_put_away_whole(tmp_path: Path, how: str) -> None:
    run = RunFolder.create(tmp_path, "run")
    for step in range(1, 10):
        run.rollouts(step).write_text(f'{{"step": {step}}}\n')
    archive = Archive(run, RecordConfig(keep_rollouts=4, keep_last=1, old_rollouts=how))  # type: ignore[arg-type]
    archive.begin(6)
    archive.after(7)
    archive.close()
    assert run.recorded_steps == [4, 5, 6, 7, 8, 9]
    packed = sorted((run.path / "rollouts").glob("*.gz"))
    assert [json.loads(gzip.decompress(path.read_bytes()))["step"] for path in packed] == (
        [1, 2, 3] if how == "compress" else []
    )


def test_what_a_resume_may_need_is_kept() -> None:
    assert kept_steps(RecordConfig(keep_rollouts=5, checkpoint_every=10, keep_last=2)) == 30
    assert kept_steps(RecordConfig(keep_rollouts=50, checkpoint_every=1)) == 50
    assert kept_steps(RecordConfig(checkpoint_every=0)) is None
