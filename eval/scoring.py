"""From answers to scores: the rule first, the judge where the rule failed.

What could not be judged stays without a score and is counted; it is neither wrong nor right.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eval.benchmark import Benchmark, Completion, Grade, Item, Mode, Unjudged, Unreadable, final_answer
from eval.journal import Record
from eval.judge import Judge
from eval.runner import Plan, Runner

GRADING_SECONDS = 30.0
"""The longest that one answer may occupy an isolated scorer; after that it is wrong, and counted."""
BINS = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072)


@dataclass(slots=True)
class Sample:
    """One scored answer. `score` is None where a judge should have decided and did not: see `unjudged`."""

    item: str
    index: int
    labels: Mapping[str, str]
    rule: float
    score: float | None
    prediction: str | None
    finish: str
    tokens: int
    cut: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    readings: Mapping[str, float] = field(default_factory=dict)
    judged: float | None = None
    unjudged: str = ""
    fault: str = ""


@dataclass
class Answered:
    """A plan's answers: the item, the sample index, what the journal holds, and the rule's grade."""

    item: Item
    index: int
    record: Record
    answer: str | None
    grade: Grade | None = None


def collect(plan: Plan, runner: Runner, thinking_prefilled: bool) -> list[Answered]:
    """Everything that was answered, in the order of the items, graded by the rule."""
    answers = []
    for item in plan.items:
        for index, record in runner.records(plan, item):
            completion = Completion(record["text"], record["finish"], record["tokens"])
            answer = final_answer(completion, thinking_prefilled)
            if completion.finish == "length" and not plan.benchmark.reads_cut_answers:
                answer = None
            answers.append(Answered(item, index, record, answer))
    tasks = [(replace(a.item, messages=(), context=""), a.answer) for a in answers]
    for answered, grade in zip(answers, _grade(plan.benchmark, tasks, runner.settings.mode), strict=True):
        answered.grade = grade
    return answers


async def score(plan: Plan, answers: Sequence[Answered], judge: Judge | None, mode: Mode) -> list[Sample]:
    """Samples with their final scores; asks the judge for those that need one."""
    return list(
        await asyncio.gather(*(_score(plan.benchmark, answered, judge, mode) for answered in answers))
    )


async def _score(benchmark: Benchmark, answered: Answered, judge: Judge | None, mode: Mode) -> Sample:
    record, grade = answered.record, answered.grade
    labels = (
        {**record["labels"], "input tokens": _bin(record["input"])}
        if benchmark.long
        else dict(record["labels"])
    )
    sample = Sample(
        item=answered.item.id,
        index=answered.index,
        labels=labels,
        rule=grade.score if grade else 0.0,
        score=grade.score if grade else 0.0,
        prediction=grade.prediction[:1000] if grade and grade.prediction else None,
        finish=record["finish"],
        tokens=record["tokens"],
        cut=record["sent"] < record["input"],
        metrics=grade.metrics if grade else {},
        fault="" if grade else "the scorer ran too long (scored 0)",
    )
    if judge is None or not benchmark.judged or grade is None or not grade.shown:
        return sample
    if grade.score >= 1.0 and not benchmark.judge_replaces:
        return sample
    try:
        verdict = await benchmark.judge(answered.item, grade, judge.ask, mode)
    except Unreadable as reason:
        if benchmark.judge_replaces:  # HELMET's protocol
            sample.score, sample.fault = 0.0, f"{reason} (scored 0)"
        else:
            sample.score, sample.unjudged = None, str(reason)
    except Unjudged as reason:
        sample.score, sample.unjudged = None, str(reason)
    else:
        sample.judged, sample.readings = verdict.score, verdict.readings
        sample.score = verdict.score if benchmark.judge_replaces else max(grade.score, verdict.score)
    return sample


def _grade(benchmark: Benchmark, tasks: list[tuple[Item, str | None]], mode: Mode) -> Iterator[Grade | None]:
    if not benchmark.isolated or not tasks:
        for item, answer in tasks:
            yield benchmark.grade(item, answer, mode)
        return
    yield from isolated(benchmark.grade, [(item, answer, mode) for item, answer in tasks], GRADING_SECONDS)


def isolated(function: Any, tasks: Sequence[tuple[Any, ...]], seconds: float) -> Iterator[Any]:
    """`function(*task)` of every task in worker processes, in order; None where one took too long.

    A worker that hangs is killed with its pool, and a new pool takes what is left: arithmetic inside
    a C extension cannot be interrupted in any gentler way.
    """
    context, start = multiprocessing.get_context("spawn"), 0
    workers = min(len(tasks), os.cpu_count() or 1)
    while start < len(tasks):
        # Receiving the function as an argument imports its module: that time is not the task's.
        with context.Pool(workers, initializer=_ready, initargs=(function,)) as pool:
            pool.apply(_ready)
            results = [pool.apply_async(function, task) for task in tasks[start:]]
            for result in results:
                start += 1
                try:
                    yield result.get(seconds)
                except multiprocessing.TimeoutError:
                    yield None
                    break


def _ready(function: Any = None) -> None:
    """Return once the process has started."""


def _bin(tokens: int) -> str:
    """Name of the length bin of a prompt, before any cut."""
    low = 0
    for high in BINS:
        if tokens <= high:
            return f"{low // 1024}K-{high // 1024}K"
        low = high
    return f"over {low // 1024}K"
