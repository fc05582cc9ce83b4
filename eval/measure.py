"""Measuring one source of completions: ask, grade, judge, write the tables."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from eval.averages import averages
from eval.benchmark import Benchmark, Item
from eval.data import Data
from eval.endpoint import CompletionSource, EndpointDied
from eval.journal import KeyedJournal
from eval.judge import JudgeModel
from eval.prompting import ChatCodec, prefills_thinking
from eval.report import Report
from eval.results import summarise
from eval.runner import BenchmarkPlan, Runner, Settings, progress_bar
from eval.scoring import collect, score
from spell_megatron.base.terminal import Terminal
from spell_megatron.types import SpellError

Loaded = tuple[Benchmark, list[Item], Counter[str]]
"""A benchmark, its items, and the rows that could not be used."""


async def measure(
    source: CompletionSource,
    codec: ChatCodec,
    plans: list[BenchmarkPlan],
    settings: Settings,
    home: Path,
    name: str,
    *,
    judge: JudgeModel | None = None,
    console: Terminal,
) -> Report:
    """Ask, grade, judge and write the tables of one source of completions. The core of `evaluate`.

    An endpoint that dies does not lose what is done: the tables are written, then the error goes on.
    """
    with KeyedJournal(home / "journal.jsonl") as journal:
        runner = Runner(source, codec, journal, settings, console)
        died: EndpointDied | None = None
        try:
            await runner.ask(plans)
        except EndpointDied as error:
            died = error
        if journal.damaged:
            say(console, f"{journal.damaged} lines of {journal.path} could not be read and are asked again")
        report = await _score(runner, plans, name, home, judge)
    report.write(home)
    say(console, f"tables: {home / 'report.md'}")
    if died is not None:
        raise EndpointDied(f"{died}; the tables in {home} hold what is done")
    return report


def load(benchmarks: Sequence[Benchmark], root: Path | None, console: Terminal) -> list[Loaded]:
    """The items of some benchmarks, from the folder of their data; without one they are downloaded.

    Raises SpellError where there is no usable row.
    """
    loaded = []
    for benchmark in benchmarks:
        data = Data(root, alone=len(benchmarks) == 1)
        items = _unique(benchmark.load(data))
        if not items:
            raise SpellError(
                f"{benchmark.name}: no usable row; {_reasons(data.bad) or 'the files are empty'}"
            )
        if data.bad:
            say(console, f"{benchmark.name}: {data.bad.total()} rows not used: {_reasons(data.bad)}")
        loaded.append((benchmark, items, data.bad))
    return loaded


def _unique(items: list[Item]) -> list[Item]:
    """Ids that occur twice get a number, so that every row is a question of its own."""
    seen: Counter[str] = Counter()
    unique = []
    for item in items:
        seen[item.id] += 1
        again = seen[item.id]
        unique.append(item if again == 1 else replace(item, id=f"{item.id}#{again}"))
    return unique


def _reasons(bad: Counter[str]) -> str:
    return ", ".join(f"{count} × {reason}" for reason, count in bad.most_common())


def plan(
    loaded: Sequence[Loaded], limits: Sequence[int], codec: ChatCodec, settings: Settings
) -> list[BenchmarkPlan]:
    """Long benchmarks once per limit, short ones once without, on the terms of the protocol."""
    plans = []
    for benchmark, items, bad in loaded:
        terms = benchmark.terms(settings.protocol)
        chosen = _first(benchmark.select(items, codec.count, terms), settings.limit)
        for limit in sorted(set(limits)) if benchmark.long else [None]:
            plans.append(BenchmarkPlan(benchmark, terms, limit, chosen, Counter(bad)))
    return plans


def _first(items: list[Item], limit: int | None) -> list[Item]:
    """So many items, of every subset its share, the first ones: files hold one subset behind the other. Those of a
    limit are among those of a larger one."""
    if limit is None:
        return items
    subsets: defaultdict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for at, item in enumerate(items):
        subsets[tuple(sorted(item.labels.items()))].append(at)
    turns = sorted(((n + 0.5) / len(own), at) for own in subsets.values() for n, at in enumerate(own))
    return [items[at] for _, at in turns[:limit]]


async def _score(
    runner: Runner, plans: Sequence[BenchmarkPlan], name: str, home: Path, judge: JudgeModel | None
) -> Report:
    """Grade and judge. Every scored sample becomes a line of `samples.jsonl`."""
    prefilled, results = prefills_thinking(runner.codec), []
    with (home / "samples.jsonl").open("w", encoding="utf-8", errors="replace") as stream:
        for part in plans:
            answers = await asyncio.to_thread(collect, part, runner, prefilled)
            with progress_bar(runner.console) as bar:
                task = bar.add_task(f"scoring {part.label}", total=len(answers), failed="")
                done = partial(bar.advance, task)
                samples = await score(part, answers, judge, runner.settings.mode, done)
            for sample in samples:
                line = {"benchmark": part.label, **asdict(sample)}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            skipped = [item.id for item in part.items if runner.skipped(part, item)]
            judge_name = judge.endpoint.model if judge else ""
            results.append(summarise(part, samples, runner.samples(part), skipped, judge_name))
    return Report(name, asdict(runner.settings), results, averages(results))


def say(console: Terminal, message: str) -> None:
    """A line of progress."""
    console.note(message)
