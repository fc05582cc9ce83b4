"""From answers to scores: the rule first, the judge where the rule failed.

What could not be judged stays without a score and is counted; it is neither wrong nor right.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from eval.benchmark import Benchmark, Completion, Grade, Item, Mode, Unjudged, Unreadable, final_answer
from eval.journal import Record
from eval.judge import JudgeModel
from eval.runner import BenchmarkPlan, Runner, window_cut
from spell_megatron.base.bounded import Bounded, TooMuch

GRADING_SECONDS = 30.0
"""The longest that one answer may occupy an isolated scorer; after that it is wrong, and counted."""
GRADING_BYTES = 2 << 30
"""The most memory that it may take."""
TOO_LONG = "the scorer took too much time or memory"
LIBRARY_MISSING = "the scorer lacks a library"
"""No fault of the answer, which stays without a score."""
WINDOW_CUT = "output limited by max_model_len"
LONGEST_SHOWN = 1_000
"""Characters of an extracted answer that are kept."""
BINS = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072)


@dataclass(slots=True)
class ScoredAnswer:
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


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """What the journal holds of one sample, and the rule's grade; a text says why there is none."""

    item: Item
    index: int
    record: Record
    grade: Grade | str


def collect(plan: BenchmarkPlan, runner: Runner, thinking_prefilled: bool) -> list[GradedAnswer]:
    """Everything that was answered, in the order of the items, graded by the rule."""
    found = [(item, index, record) for item in plan.items for index, record in runner.records(plan, item)]
    benchmark, mode = plan.benchmark, runner.settings.mode
    tasks = [
        (
            benchmark,
            replace(item, messages=(), context=""),
            _answer(benchmark, record, thinking_prefilled),
            mode,
        )
        for item, _, record in found
    ]
    grades = (
        isolated(f"{__name__}:{_grade.__name__}", tasks, GRADING_SECONDS)
        if benchmark.isolated
        else (_grade(*t) for t in tasks)
    )
    return [
        GradedAnswer(*entry, TOO_LONG if g is None else g) for entry, g in zip(found, grades, strict=True)
    ]


async def score(
    plan: BenchmarkPlan,
    answers: Sequence[GradedAnswer],
    judge: JudgeModel | None,
    mode: Mode,
    done: Callable[[], None],
) -> list[ScoredAnswer]:
    """Samples with their final scores; asks the judge for those that need one. `done` is called for each."""

    async def one(answered: GradedAnswer) -> ScoredAnswer:
        sample = await _score(plan.benchmark, answered, judge, mode)
        done()
        return sample

    return list(await asyncio.gather(*map(one, answers)))


async def _score(
    benchmark: Benchmark, answered: GradedAnswer, judge: JudgeModel | None, mode: Mode
) -> ScoredAnswer:
    sample, grade = _ruled(benchmark, answered), answered.grade
    if judge is None or not benchmark.judged or isinstance(grade, str) or not grade.shown:
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


def _ruled(benchmark: Benchmark, answered: GradedAnswer) -> ScoredAnswer:
    """The sample as the rule alone sees it."""
    record, grade = answered.record, answered.grade
    labels = dict(record["labels"])
    if benchmark.long:
        labels["input tokens"] = _bin(record["input"])
    sample = ScoredAnswer(
        item=answered.item.id,
        index=answered.index,
        labels=labels,
        rule=0.0,
        score=0.0,
        prediction=None,
        finish=record["finish"],
        tokens=record["tokens"],
        cut=record["sent"] < record["input"],
    )
    if isinstance(grade, Grade):
        sample.rule = sample.score = grade.score
        sample.prediction = grade.prediction[:LONGEST_SHOWN] if grade.prediction else None
        sample.metrics = grade.metrics
        sample.fault = WINDOW_CUT if window_cut(record) else ""
    elif grade.startswith(LIBRARY_MISSING):
        sample.score, sample.unjudged = None, grade
    else:
        sample.fault = f"{grade} (scored 0)"
    return sample


def _answer(benchmark: Benchmark, record: Record, thinking_prefilled: bool) -> str | None:
    completion = Completion(record["text"], record["finish"], record["tokens"])
    if completion.finish == "length" and not benchmark.reads_cut_answers:
        return None
    return final_answer(completion, thinking_prefilled)


def _grade(benchmark: Benchmark, item: Item, answer: str | None, mode: Mode) -> Grade | str:
    """The rule's grade. A scorer that stumbles over an answer must not end a run of many hours."""
    try:
        return benchmark.grade(item, answer, mode)
    except MemoryError:
        raise
    except ImportError as error:
        return f"{LIBRARY_MISSING}: {error}"
    except Exception as error:
        return f"the scorer failed: {type(error).__name__}: {error}"


def isolated(function: str, tasks: Sequence[tuple[Any, ...]], seconds: float) -> Iterator[Any]:
    """`function(*task)` of every task in worker processes, in order; None where one took too much. See `Bounded`."""
    if not tasks:
        return
    idle: SimpleQueue[Bounded] = SimpleQueue()
    workers = [
        Bounded(function, seconds=seconds, memory=GRADING_BYTES, sample=tasks[0])
        for _ in range(min(len(tasks), len(os.sched_getaffinity(0))))
    ]

    def one(task: tuple[Any, ...]) -> Any:
        worker = idle.get()
        try:
            return worker(*task)
        except TooMuch:
            return None
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        for worker in workers:
            idle.put(worker)
        try:
            yield from pool.map(one, tasks)
        finally:
            for worker in workers:
                worker.close()


def _bin(tokens: int) -> str:
    """Name of the length bin of a prompt, before any cut."""
    low = 0
    for high in BINS:
        if tokens <= high:
            return f"{low // 1024}K-{high // 1024}K"
        low = high
    return f"over {low // 1024}K"
