"""Evaluation from end to end: load, ask, grade, judge, report; one model after the other."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from eval.benchmark import Benchmark, Item
from eval.benchmarks import find
from eval.data import Data
from eval.endpoint import Endpoint, EndpointDied, Limits, Source
from eval.journal import Journal
from eval.judge import Judge
from eval.prompting import Codec, prefills_thinking
from eval.report import Comparison, Report, compare, overall, plot, summarise
from eval.runner import Plan, Runner, Settings
from eval.scoring import collect, score
from spell_megatron.config import Rollout
from spell_megatron.types import SpellError

Loaded = tuple[Benchmark, list[Item], Counter[str]]
"""A benchmark, its items, and the rows that could not be used."""

RESERVE = 512
"""Tokens of a served context window beyond the longest input and output."""


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """An OpenAI-compatible endpoint that judges; `url` empty: the rule alone decides."""

    url: str = ""
    model: str = ""
    api_key: str = ""
    concurrency: int = 16
    timeout: float = 600.0


@dataclass(frozen=True)
class Evaluation:
    """One report a model, and their comparison where there are several."""

    reports: list[Report]
    comparison: Comparison | None

    @property
    def complete(self) -> bool:
        return all(report.complete for report in self.reports)


def evaluate(
    benchmarks: Sequence[str] = (),
    *,
    models: Sequence[str | Path] = (),
    endpoint: str = "",
    endpoint_model: str = "",
    api_key: str = "",
    tokenizer: str | Path = "",
    data: Path | None = None,
    out: Path = Path("eval-runs"),
    max_input: Sequence[int] = (16_384,),
    settings: Settings | None = None,
    judge: JudgeSettings | None = None,
    serving: Rollout | None = None,
    limits: Limits | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure models on benchmarks (all public ones where none is named).

    Each of `models` (Hugging Face folders) gets a vLLM server of its own; or one model is asked at
    `endpoint`, with the tokenizer from `tokenizer` (the served folder where it is local). `data` is
    the folder of the data sets; without it they are downloaded. Tables and the journal are written
    below `out`; the same call again goes on where the last one stopped.

    Raises SpellError for bad arguments or missing data, EndpointDied where the endpoint is gone (the
    tables of what is done are written first).
    """
    settings, judge = settings or Settings(), judge or JudgeSettings()
    console = console or Console(stderr=True)
    if bool(models) == bool(endpoint):
        raise SpellError("give either model folders or one endpoint")
    if not max_input or any(limit < 16 for limit in max_input):
        raise SpellError("--max-input takes limits of at least 16 tokens, for example 16384 100000")
    if settings.samples < 1 or settings.concurrency < 1:
        raise SpellError("--samples and the concurrency are at least 1")
    folders = [Path(model) for model in models]
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise SpellError(f"{folder} is no Hugging Face model folder: it has no config.json")
    work = _Work(_load(find(benchmarks), data, console), max_input, settings, judge, out, console)
    if endpoint:
        source = Endpoint(endpoint, model=endpoint_model, api_key=api_key, limits=limits)
        return Evaluation([asyncio.run(work.report(source, tokenizer, endpoint_model))], None)
    from spell_megatron.rollout.server import SERVED_NAME, serve  # torch: only where a server is started

    reports = []
    for folder in folders:
        home = out / _safe(str(folder))
        console.print(f"starting a vLLM server for {folder} (log: {home / 'server.log'})")
        with serve(folder, serving or work.serving(folder), home / "vllm", log=home / "server.log") as url:
            source = Endpoint(url, model=SERVED_NAME, limits=limits, identity=_fingerprint(folder))
            reports.append(asyncio.run(work.report(source, tokenizer or folder, str(folder))))
    if len(reports) == 1:
        return Evaluation(reports, None)
    comparison = compare(reports)
    comparison.write(out)
    plot(reports, out / "comparison.png")
    return Evaluation(reports, comparison)


async def measure(
    source: Source,
    codec: Codec,
    plans: list[Plan],
    settings: Settings,
    home: Path,
    name: str,
    *,
    judge: Judge | None = None,
    console: Console,
) -> Report:
    """Ask, grade, judge and write the tables of one source of completions. The core of `evaluate`.

    An endpoint that dies does not lose what is done: the tables are written, then the error goes on.
    """
    with Journal(home / "journal.jsonl") as journal:
        runner = Runner(source, codec, journal, settings, console)
        died: EndpointDied | None = None
        try:
            await runner.ask(plans)
        except EndpointDied as error:
            died = error
        if journal.damaged:
            console.print(
                f"[yellow]{journal.damaged} lines of {journal.path} could not be read and are asked again"
            )
        report = await _score(runner, plans, name, home, judge)
    report.write(home)
    console.print(f"tables: {home / 'report.md'}")
    if died is not None:
        raise EndpointDied(f"{died}; the tables in {home} hold what is done")
    return report


def plan(
    loaded: Sequence[Loaded], limits: Sequence[int], codec: Codec, first: int | None = None
) -> list[Plan]:
    """Long benchmarks once per limit, short ones once without; of every benchmark the `first` items."""
    plans = []
    for benchmark, items, bad in loaded:
        chosen = benchmark.select(items, codec.count)[:first]
        for limit in sorted(set(limits)) if benchmark.long else [None]:
            plans.append(Plan(benchmark, limit, chosen, Counter(bad)))
    return plans


async def _score(
    runner: Runner, plans: list[Plan], settings: Settings, name: str, judge: Judge | None
) -> Report:
    prefilled = prefills_thinking(runner.codec)
    results = []
    for part in plans:
        answers = await asyncio.to_thread(collect, part, runner, prefilled)
        samples = await score(part, answers, judge, settings.mode)
        skipped = sum(runner.skipped(part, item) for item in part.items)
        judge_name = judge.endpoint.model if judge else ""
        results.append(summarise(part, samples, runner.samples(part.benchmark), skipped, judge_name))
    six = {kind.name: kind for kind in find()}
    return Report(name, {**asdict(settings)}, results, overall(results, six))


@dataclass(frozen=True)
class _Work:
    """What is asked of every model."""

    loaded: Sequence[Loaded]
    max_input: Sequence[int]
    settings: Settings
    judge: JudgeSettings
    out: Path
    console: Console

    async def report(self, source: Endpoint, tokenizer: str | Path, name: str) -> Report:
        """Measure what an endpoint serves. `name` is how tables call it; the served name where empty."""
        from tokenizer.chat import ChatTokenizer  # transformers: processes that score must not wait for it

        async with AsyncExitStack() as stack:
            await stack.enter_async_context(source)
            codec = ChatTokenizer.load(tokenizer or _served_folder(source), thinking=self.settings.thinking)
            source.stop = codec.eos_ids
            name = name or source.model
            home = self.out / _safe(name)
            judge = await self._judge(stack, home)
            plans = plan(self.loaded, self.max_input, codec, self.settings.limit)
            return await measure(
                source, codec, plans, self.settings, home, name, judge=judge, console=self.console
            )

    async def _judge(self, stack: AsyncExitStack, home: Path) -> Judge | None:
        wanted = self.judge
        if not wanted.url:
            return None
        limits = Limits(timeout=wanted.timeout, tries=1)
        endpoint = Endpoint(wanted.url, model=wanted.model, api_key=wanted.api_key, limits=limits)
        verdicts = stack.enter_context(Journal(home / "verdicts.jsonl"))
        return Judge(await stack.enter_async_context(endpoint), verdicts, wanted.concurrency)

    def serving(self, folder: Path) -> Rollout:
        """A server with room for the longest input and output, in the precision of the weights."""
        outputs = [benchmark.max_tokens + benchmark.reasoning_tokens for benchmark, _, _ in self.loaded]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = config.get("dtype") or config.get("torch_dtype")
        return Rollout(
            dtype=dtype if dtype in ("float32", "float16") else "bfloat16",
            max_model_len=max(self.max_input) + (self.settings.max_tokens or max(outputs)) + RESERVE,
        )


def _load(benchmarks: Sequence[Benchmark], root: Path | None, console: Console) -> list[Loaded]:
    loaded = []
    for benchmark in benchmarks:
        data = Data(root, alone=len(benchmarks) == 1)
        items = _unique(benchmark.load(data))
        if not items:
            raise SpellError(
                f"{benchmark.name}: no usable row; {_reasons(data.bad) or 'the files are empty'}"
            )
        if data.bad:
            console.print(f"[yellow]{benchmark.name}: {data.bad.total()} rows not used: {_reasons(data.bad)}")
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


def _served_folder(endpoint: Endpoint) -> Path:
    for name in (endpoint.root, endpoint.model):
        if name and Path(name).is_dir():
            return Path(name)
    raise SpellError(
        f"{endpoint.url} serves {endpoint.model!r}, whose tokenizer is not on this machine: give its folder"
        " with --tokenizer"
    )


def _fingerprint(folder: Path) -> tuple[str, ...]:
    """Names the weights of a folder: other weights at the same path must not share a journal."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return (folder.name, hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16])


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[-100:] or "model"
