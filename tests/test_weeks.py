"""Ten thousand steps of what rank 0 keeps and writes: flat in memory, constant in work."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import psutil
import pytest

from spell_megatron.config import Corpus, Record, Source
from spell_megatron.corpus import ClusterSampler
from spell_megatron.record import Archive, Metrics, RunFolder
from spell_megatron.record.archive import kept_steps
from spell_megatron.record.folder import JsonLines, replace_text
from spell_megatron.selfplay.memory import Memory
from spell_megatron.types import Question

pytestmark = pytest.mark.unit

STEPS, QUESTIONS, KEPT = 10_000, 2, 20


def test_ten_thousand_steps_are_flat(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "weeks")
    for number in range(400):
        (texts := tmp_path / "texts").mkdir(exist_ok=True)
        (texts / f"{number}.txt").write_text(f"{number} " + f"word{number} " * 20)
    corpus = Corpus(sources=(Source(path=str(texts), group_by="random"),), cluster_tokens=100)
    sampler = ClusterSampler(corpus, lambda text: len(text) // 4, 0)
    assert sum(sampler.domains.values()) > 100
    memory, metrics = Memory(3, limit=100), Metrics(run, after=-1)
    archive = Archive(run, Record(keep_rollouts=KEPT, old_rollouts="remove"))
    saved = run.checkpoints / "state.json"
    work: dict[int, Counter[str]] = {}
    resident = 0
    for step in range(1, STEPS + 1):
        journal = JsonLines(run.rollouts(step))
        for number, (cluster, task) in enumerate(sampler.draw(QUESTIONS)):
            question = Question(task, f"question {step} {number} " + "of words " * 20, "12")
            memory.store(task, cluster.id, (0, 1), question, step)
            journal.append({"step": step, "question": question.text})
        journal.close()
        metrics.log(step, {"responder/reward": 0.5, "policy/loss": 0.1})
        archive.after(step)
        if step % 100 == 0:
            state = {"memory": memory.state(), "clusters": sampler.state()}
            replace_text(saved, json.dumps(state))
        if step in (100, STEPS):
            work[step] = Counter(
                state=saved.stat().st_size,
                journal=run.rollouts(step).stat().st_size,
                row=len(run.metrics.read_bytes().splitlines()[-1]),
                questions=len(memory),
            )
        if step == 100:
            resident = psutil.Process().memory_info().rss
    grown = psutil.Process().memory_info().rss - resident
    metrics.close()
    archive.close()
    assert grown <= 50 << 20
    assert sum(work[STEPS].values()) <= 1.2 * sum(work[100].values())
    assert run.recorded_steps == list(range(STEPS - KEPT + 1, STEPS + 1))


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
    archive = Archive(run, Record(keep_rollouts=4, keep_last=1, old_rollouts=how))  # type: ignore[arg-type]
    archive.begin(6)
    archive.after(7)
    archive.close()
    assert run.recorded_steps == [4, 5, 6, 7, 8, 9]
    packed = sorted((run.path / "rollouts").glob("*.gz"))
    assert [json.loads(gzip.decompress(path.read_bytes()))["step"] for path in packed] == (
        [1, 2, 3] if how == "compress" else []
    )


def test_what_a_resume_may_need_is_kept() -> None:
    assert kept_steps(Record(keep_rollouts=5, checkpoint_every=10, keep_last=2)) == 30
    assert kept_steps(Record(keep_rollouts=50, checkpoint_every=1)) == 50
    assert kept_steps(Record(checkpoint_every=0)) is None
