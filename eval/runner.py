"""Asking: every sample of every item, once, with bounded concurrency, into a journal.

A sample is named by everything that its answer depends on (item, prompt, limit, sampling, seed,
weights), so a run that is killed and started again asks only for what is missing, and a run with
other settings shares nothing by mistake.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from eval.benchmark import Benchmark, Item, Mode, ProtocolName, Terms
from eval.endpoint import CompletionSource, EndpointDied, Refused, Unanswered
from eval.journal import KeyedJournal, Record, key_of
from eval.prompting import ChatCodec, build
from spell_megatron.base.pulse import Pulse, clock
from spell_megatron.base.terminal import Terminal

PATIENCE = 20
"""Samples that fail one after the other before the endpoint counts as dead although it lists its models."""
_WHOLE = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to ask and to score.

    `max_tokens` overrides every benchmark's own output limit; `limit` takes so many items, of every subset its share.
    """

    samples: int = 8
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    max_tokens: int | None = None
    mode: Mode = "spell"
    protocol: ProtocolName = "paper"
    thinking: bool = False
    concurrency: int = 64
    limit: int | None = None


@dataclass
class BenchmarkPlan:
    """One benchmark at one input limit, and what went wrong on the way. `bad` counts unusable rows."""

    benchmark: Benchmark
    terms: Terms
    max_input: int | None
    items: list[Item]
    bad: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def label(self) -> str:
        """The benchmark's name with its limit, as tables show it."""
        return self.benchmark.name if self.max_input is None else f"{self.benchmark.name}@{self.max_input}"


@dataclass
class Runner:
    """Asks a source for all samples of some plans. `codec` is the tokenizer of the source's model."""

    source: CompletionSource
    codec: ChatCodec
    journal: KeyedJournal
    settings: Settings
    console: Terminal

    def __post_init__(self) -> None:
        self._tokenizer = key_of(
            self.codec.conversation(({"role": "user", "content": "The quick brown fox: 42?"},))
        )
        self._failures_in_a_row = 0

    def samples(self, plan: BenchmarkPlan) -> int:
        return 1 if plan.terms.greedy else self.settings.samples

    def records(self, plan: BenchmarkPlan, item: Item) -> Iterator[tuple[int, Record]]:
        """What the journal has of one item: sample index and record."""
        base = self._item_key(plan, item)
        for index in range(self.samples(plan)):
            if (record := self._record(self._sample_key(plan, item, base, index))) is not None:
                yield index, record

    def skipped(self, plan: BenchmarkPlan, item: Item) -> bool:
        """Whether the item did not fit into the limit."""
        return key_of("skip", self._item_key(plan, item)) in self.journal

    async def ask(self, plans: list[BenchmarkPlan]) -> None:
        """Fill the journal. Raises EndpointDied, and what the source or the journal cannot go on after; samples that
        fail are counted in their plan."""
        total = sum(len(plan.items) * self.samples(plan) for plan in plans)
        with progress_bar(self.console) as bar:
            task = bar.add_task("asking", total=total, failed="")
            queue: asyncio.Queue[_Job | None] = asyncio.Queue(maxsize=self.settings.concurrency)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.settings.concurrency):
                        group.create_task(self._work(queue, bar, task))
                    await self._feed(plans, queue, bar, task)
            except ExceptionGroup as faults:  # what ends one of them ends all
                raise faults.exceptions[0] from None

    async def _feed(
        self, plans: list[BenchmarkPlan], queue: asyncio.Queue[_Job | None], bar: Progress, task: TaskID
    ) -> None:
        """Put what is missing into the queue, an item's samples together: a prefix cache likes that."""
        for plan in plans:
            samples = range(self.samples(plan))
            for item in plan.items:
                base = self._item_key(plan, item)
                keys = {index: self._sample_key(plan, item, base, index) for index in samples}
                missing = {index: key for index, key in keys.items() if not self._answered(plan, item, key)}
                if key_of("skip", base) in self.journal:
                    missing = {}
                jobs = await self._jobs(plan, item, base, missing) if missing else []
                bar.advance(task, len(samples) - len(jobs))
                for job in jobs:
                    await queue.put(job)
        for _ in range(self.settings.concurrency):
            await queue.put(None)

    async def _jobs(self, plan: BenchmarkPlan, item: Item, base: str, missing: dict[int, str]) -> list[_Job]:
        """Requests for the missing samples of an item; none where its prompt does not fit."""
        prompt = await asyncio.to_thread(build, plan.terms.cut, item, self.codec, plan.max_input)
        if prompt.ids is None:
            self.journal.append(key_of("skip", base), {"skipped": prompt.whole})
            return []
        room = self._room(plan, item, len(prompt.ids))
        if room <= 0:
            plan.failed["the prompt does not fit into the endpoint's max_model_len"] += len(missing)
            return []
        placed = await asyncio.to_thread(plan.benchmark.place, item, self.codec.count)
        facts = {"item": item.id, "benchmark": plan.label, "input": prompt.whole, "sent": len(prompt.ids)}
        facts["labels"] = dict(placed.labels)
        if room < self._max_tokens(plan, item):
            facts["room"] = room
        return [_Job(plan, item, prompt.ids, key, index, room, facts) for index, key in missing.items()]

    async def _work(self, queue: asyncio.Queue[_Job | None], bar: Progress, task: TaskID) -> None:
        while (job := await queue.get()) is not None:
            await self._complete(job)
            failed = sum(job.plan.failed.values())
            bar.update(task, advance=1, failed=f"{failed} failed" if failed else "")

    async def _complete(self, job: _Job) -> None:
        greedy = job.plan.terms.greedy
        try:
            completion = await self.source.complete(
                job.ids,
                seed=job.plan.benchmark.seed(job.item, job.index, self.settings.seed),
                max_tokens=job.max_tokens,
                temperature=0.0 if greedy else self.settings.temperature,
                top_p=1.0 if greedy else self.settings.top_p,
            )
        except Refused as refusal:
            job.plan.failed[_reason(refusal)] += 1
            return
        except Unanswered as silence:
            self._failures_in_a_row += 1
            if not await self.source.alive():
                raise EndpointDied(
                    f"the endpoint died ({silence}); start the same command again to go on"
                ) from None
            if self._failures_in_a_row >= PATIENCE:
                raise EndpointDied(
                    f"the endpoint is up but {self._failures_in_a_row} samples in a row failed ({silence});"
                    " start the same command again to go on"
                ) from None
            job.plan.failed[_reason(silence)] += 1
            return
        self._failures_in_a_row = 0
        answer = {
            "sample": job.index,
            "text": completion.text,
            "finish": completion.finish,
            "tokens": completion.tokens,
        }
        self.journal.append(job.key, {**job.facts, **answer})

    def _answered(self, plan: BenchmarkPlan, item: Item, key: str) -> bool:
        """Whether the journal has an answer, and not one that the source's window cut before it grew."""
        if (record := self._record(key)) is None:
            return False
        return not window_cut(record) or self._room(plan, item, record["sent"]) <= int(record["room"])

    def _record(self, key: str) -> Record | None:
        """A sample of the journal; None for what is no whole answer: journals may hold aborted ones."""
        record = self.journal.get(key)
        return record if record is not None and record.get("finish") in _WHOLE else None

    def _room(self, plan: BenchmarkPlan, item: Item, sent: int) -> int:
        """Output tokens that are asked for: what was wanted, or what a prompt leaves of the source's window."""
        wanted, window = self._max_tokens(plan, item), self.source.max_model_len
        return wanted if window is None else min(wanted, window - sent)

    def _max_tokens(self, plan: BenchmarkPlan, item: Item) -> int:
        return self.settings.max_tokens or plan.terms.output(item, self.settings.thinking)

    def _item_key(self, plan: BenchmarkPlan, item: Item) -> str:
        messages = [dict(message) for message in item.messages]
        return key_of(
            *(list(self.source.identity), self._tokenizer, plan.benchmark.name, plan.terms.cut),
            *(item.id, messages, plan.max_input),
        )

    def _sample_key(self, plan: BenchmarkPlan, item: Item, base: str, index: int) -> str:
        settings = self.settings
        sampling = [0.0, 1.0] if plan.terms.greedy else [settings.temperature, settings.top_p]
        seed = plan.benchmark.seed(item, index, settings.seed)
        return key_of(base, sampling, self._max_tokens(plan, item), seed)


@dataclass(frozen=True, slots=True)
class _Job:
    plan: BenchmarkPlan
    item: Item
    ids: list[int]
    key: str
    index: int
    max_tokens: int
    facts: Record


def window_cut(record: Record) -> bool:
    """Whether an answer was cut before its output limit: `room` is recorded where the source's window had less."""
    return "room" in record and record["finish"] == "length"


def _reason(error: Exception) -> str:
    """An error's words without the numbers that make each of them different."""
    status, colon, rest = str(error).partition(":")
    return status + colon + re.sub(r"\d{2,}", "…", rest)[:120]


@contextmanager
def progress_bar(console: Terminal) -> Iterator[Progress]:
    """Count, elapsed time, and the time that is left. Tasks have a field `failed`. No terminal: a line a minute."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[red]{task.fields[failed]}"),
        console=console,
        transient=True,
    )
    with bar, Pulse(lambda: Text("; ".join(map(_standing, bar.tasks))), console):
        yield bar


def _standing(task: Task) -> str:
    left = "" if task.time_remaining is None else f", {clock(task.time_remaining)} left"
    failed = f", {task.fields['failed']}" if task.fields["failed"] else ""
    return f"{task.description} {task.completed:.0f}/{task.total or 0:.0f} {clock(task.elapsed or 0)}{left}{failed}"
