"""Evaluation from end to end: load, ask, grade, judge, report; one model after the other."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.benchmark import Benchmark
from eval.benchmarks import find
from eval.beside import Beside, beside
from eval.comparison import Comparison, compare
from eval.endpoint import Endpoint, RequestLimits, fingerprint
from eval.journal import KeyedJournal
from eval.judge import JudgeModel
from eval.measure import Loaded, load, measure, plan, say
from eval.paper import find_model
from eval.plot import plot
from eval.report import Report
from eval.runner import Settings
from spell_megatron.base.files import hf_config, weights_dtype
from spell_megatron.base.ownership import private
from spell_megatron.base.pulse import working
from spell_megatron.base.terminal import Terminal
from spell_megatron.config import RolloutConfig
from spell_megatron.types import SpellError

SHORT = 8_192
"""Room for the prompts of benchmarks that have no input limit."""
RESERVE = 512
"""Tokens of a served context window beyond the longest input and output."""


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """An OpenAI-compatible endpoint that judges; `url` empty: the rule alone decides."""

    url: str = ""
    model: str = ""
    api_key: str = field(default="", repr=False)
    concurrency: int = 16
    timeout: float = 600.0


@dataclass(frozen=True)
class Evaluation:
    """One report a model, their comparison where there are several, and each beside the paper where asked for."""

    reports: list[Report]
    comparison: Comparison | None = None
    paper: Sequence[Beside] = ()

    @property
    def complete(self) -> bool:
        return all(report.complete for report in self.reports)

    def to_json(self) -> dict[str, Any]:
        comparison = self.comparison.to_json() if self.comparison else None
        reports = [report.to_json() for report in self.reports]
        paper = [one.to_json() for one in self.paper]
        return {"complete": self.complete, "reports": reports, "comparison": comparison, "paper": paper}


def evaluate(
    benchmarks: Sequence[str] = (),
    *,
    models: Sequence[str | Path] = (),
    endpoint: str | None = None,
    endpoint_model: str = "",
    api_key: str = "",
    tokenizer: str | Path | None = None,
    data: Path | None = None,
    out: Path = Path("eval-runs"),
    max_input: Sequence[int] = (16_384,),
    settings: Settings | None = None,
    judge: JudgeSettings | None = None,
    serving: RolloutConfig | None = None,
    limits: RequestLimits | None = None,
    console: Terminal | None = None,
    beside_paper: str | None = None,
) -> Evaluation:
    """Measure models on benchmarks (all public ones where none is named).

    Each of `models` (Hugging Face folders) gets a vLLM server of its own; or one model is asked at
    `endpoint`, with the tokenizer from `tokenizer` (the served folder where it is local). `data` is
    the folder of the data sets; without it they are downloaded. Tables and the journal are written
    below `out`; the same call again goes on where the last one stopped. `beside_paper` sets every report beside the
    paper's rows of that model; empty, of the model that the folder's or the served name holds.

    Raises SpellError for bad arguments or missing data, EndpointDied where the endpoint is gone (the
    tables of what is done are written first).
    """
    settings, judge = settings or Settings(), judge or JudgeSettings()
    console = console or Terminal(stderr=True)
    if bool(models) == bool(endpoint):
        raise SpellError("give either model folders or one endpoint")
    if not max_input or any(limit < 16 for limit in max_input):
        raise SpellError("--max-input takes limits of at least 16 tokens, for example 16384 100000")
    if settings.samples < 1 or settings.concurrency < 1:
        raise SpellError("--samples and the concurrency are at least 1")
    for option, value in (("--limit", settings.limit), ("--max-tokens", settings.max_tokens)):
        if value is not None and value < 1:
            raise SpellError(f"{option} is at least 1, found {value}")
    folders = [Path(model) for model in models]
    for folder in folders:
        hf_config(folder)  # it is a model's
    names = [str(folder) for folder in folders] or [endpoint_model or endpoint or ""]
    paper = None if beside_paper is None else [find_model(beside_paper or name) for name in names]
    if paper and settings.protocol != "paper":
        raise SpellError("--compare paper needs --protocol paper: the paper's figures are measured so")
    with working("reading the data of the benchmarks", console):
        loaded = load(find(benchmarks), data, console)
    work = _Work(loaded, max_input, settings, judge, out, console)
    if endpoint:
        source = Endpoint(endpoint, model=endpoint_model, api_key=api_key, limits=limits)
        return _finished([asyncio.run(work.report(source, tokenizer, endpoint_model))], paper, out)
    from spell_megatron.rollout.dialect import SERVED_NAME
    from spell_megatron.rollout.server import serve  # torch: only where a server is started

    reports = []
    for folder in folders:
        home = out / _safe(str(folder))
        say(console, f"starting a vLLM server for {folder} (log: {home / 'server.log'})")
        server = serve(folder, serving or work.serving(folder), home / "vllm", log=home / "server.log")
        home.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with working("starting the server", console), private(group_readable=False):
                served = stack.enter_context(server)
            source = Endpoint(served, model=SERVED_NAME, limits=limits, identity=fingerprint(folder))
            reports.append(asyncio.run(work.report(source, tokenizer or folder, str(folder))))
    return _finished(reports, paper, out)


def _finished(reports: list[Report], paper: Sequence[str] | None, out: Path) -> Evaluation:
    """The reports with what is set beside them, written below `out`."""
    comparison = compare(reports) if len(reports) > 1 else None
    if comparison:
        comparison.write(out)
        plot({report.model: report.results for report in reports}, out / "comparison.png")
    rows = [beside(report, model) for report, model in zip(reports, paper or (), strict=False)]
    for row in rows:
        (out / _safe(row.name) / "paper.md").write_text(row.markdown(), encoding="utf-8")
    return Evaluation(reports, comparison, rows)


@dataclass(frozen=True)
class _Work:
    """What is asked of every model."""

    loaded: Sequence[Loaded]
    max_input: Sequence[int]
    settings: Settings
    judge: JudgeSettings
    out: Path
    console: Terminal

    async def report(self, source: Endpoint, tokenizer: str | Path | None, name: str) -> Report:
        """Measure what an endpoint serves. `name` is how tables call it; the served name where empty."""
        from tokenizer.chat import ChatTokenizer  # transformers: processes that score must not wait for it

        async with AsyncExitStack() as stack:
            await stack.enter_async_context(source)
            codec = ChatTokenizer.load(tokenizer or _served_folder(source), thinking=self.settings.thinking)
            source.stop = codec.eos_ids
            source.shows_special = codec.hides_thinking
            name = name or source.model
            home = self.out / _safe(name)
            judge = await self._judge(stack, home)
            plans = plan(self.loaded, self.max_input, codec, self.settings)
            return await measure(
                source, codec, plans, self.settings, home, name, judge=judge, console=self.console
            )

    async def _judge(self, stack: AsyncExitStack, home: Path) -> JudgeModel | None:
        wanted = self.judge
        if not wanted.url:
            return None
        limits = RequestLimits(timeout=wanted.timeout, tries=1)
        endpoint = Endpoint(wanted.url, model=wanted.model, api_key=wanted.api_key, limits=limits)
        verdicts = stack.enter_context(KeyedJournal(home / "verdicts.jsonl"))
        return JudgeModel(await stack.enter_async_context(endpoint), verdicts, wanted.concurrency)

    def serving(self, folder: Path) -> RolloutConfig:
        """A server with room for the longest input and output, in the precision of the weights.

        Raises SpellError where the model's window is smaller than an input limit.
        """
        config = hf_config(folder)
        window = int(config.get("max_position_embeddings") or 0)
        output = max(self._output(benchmark) for benchmark, _, _ in self.loaded)
        limit = max(self.max_input)
        inputs = {limit if benchmark.long else SHORT for benchmark, _, _ in self.loaded}
        if window and limit > window and any(benchmark.long for benchmark, _, _ in self.loaded):
            raise SpellError(
                f"{folder} has a window of {window} tokens (max_position_embeddings), --max-input {limit}"
                " is longer: extend it in config.json (rope_parameters: yarn), or give a smaller limit"
            )
        wanted = max(inputs) + output + RESERVE
        if window and wanted > window:
            say(self.console, f"{folder}: outputs end at the model's window of {window} tokens")
        return RolloutConfig(
            dtype="float32" if weights_dtype(config) == "float32" else "bfloat16",
            max_model_len=min(wanted, window or wanted),
        )

    def _output(self, benchmark: Benchmark) -> int:
        settings = self.settings
        return settings.max_tokens or benchmark.terms(settings.protocol).output(None, settings.thinking)


def _served_folder(endpoint: Endpoint) -> Path:
    for name in (endpoint.root, endpoint.model):
        if name and Path(name).is_dir():
            return Path(name)
    raise SpellError(
        f"{endpoint.url} serves {endpoint.model!r}, whose tokenizer is not on this machine: give its folder"
        " with --tokenizer"
    )


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[-100:] or "model"
