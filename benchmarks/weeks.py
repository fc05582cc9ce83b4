"""What rank 0 keeps and writes in each step of a long run: its memory, and its time late in the run against early.

    python -m benchmarks.weeks [--steps 10000] [--json]

Everything that lives as long as a run is there (corpus, history memory, journals, metrics, archive, saved state); no
engine plays and nothing is trained.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import psutil
import typer

from benchmarks.common import show
from spell_megatron.config import CorpusConfig, RecordConfig, SourceConfig
from spell_megatron.corpus import ClusterSampler
from spell_megatron.run.record import Archive, Metrics, RunFolder
from spell_megatron.run.record.folder import JsonLines, replace_text
from spell_megatron.selfplay.memory import Memory
from spell_megatron.types import Question

QUESTIONS, KEPT, CHECKPOINT_EVERY = 2, 20, 100


class Weeks:
    """A run without its models, in a folder."""

    def __init__(self, folder: Path) -> None:
        texts = folder / "texts"
        texts.mkdir()
        for number in range(400):
            (texts / f"{number}.txt").write_text(f"{number} " + f"word{number} " * 20)
        self.run = RunFolder.create(folder, "weeks")
        corpus = CorpusConfig(sources=(SourceConfig(path=str(texts), group_by="random"),), cluster_tokens=100)
        self._sampler = ClusterSampler(corpus, lambda text: len(text) // 4, 0)
        self._memory, self._metrics = Memory(3, limit=100), Metrics(self.run, after=-1)
        self._archive = Archive(self.run, RecordConfig(keep_rollouts=KEPT, old_rollouts="remove"))
        self.saved = self.run.checkpoints / "state.json"

    def step(self, step: int) -> None:
        journal = JsonLines(self.run.rollouts(step))
        for number, (cluster, task) in enumerate(self._sampler.draw(QUESTIONS)):
            question = Question(task, f"question {step} {number} " + "of words " * 20, "12")
            self._memory.store(task, cluster.id, (0, 1), question, step)
            journal.append({"step": step, "question": question.text})
        journal.close()
        self._metrics.log(step, {"responder/reward": 0.5, "policy/loss": 0.1})
        self._archive.after(step)
        if step % CHECKPOINT_EVERY == 0:
            state = {"memory": self._memory.state(), "clusters": self._sampler.state()}
            replace_text(self.saved, json.dumps(state))

    def close(self) -> None:
        self._metrics.close()
        self._archive.close()


def main(steps: int = 10_000, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    process, before = psutil.Process(), 0
    cases: list[dict[str, float]] = []
    with TemporaryDirectory() as folder:
        weeks = Weeks(Path(folder))
        for end in sorted({100, steps // 100 * 50, steps // 100 * 100}):
            for step in range(before + 1, end - 99):
                weeks.step(step)
            began = time.perf_counter()
            for step in range(end - 99, end + 1):
                weeks.step(step)
            seconds = (time.perf_counter() - began) / 100
            case = {
                "step": end,
                "seconds_a_step": seconds,
                "resident_mib": process.memory_info().rss / (1 << 20),
            }
            cases.append({**case, "over_the_first": seconds / cases[0]["seconds_a_step"] if cases else 1.0})
            before = end
        weeks.close()
    show("What rank 0 does besides, per step", cases, as_json)


if __name__ == "__main__":
    typer.run(main)
