"""A step's rollouts with barriers between the roles, in units of the same step without them.

    python -m benchmarks.pipeline [--questions 24] [--rounds 3] [--json]

The toy model plays the toy world on a real vLLM engine in this process. Its prompts are short: three clusters make
one. Its answers are short and all alike, so lengths are imposed: every completion goes on for as many tokens as
its seed says, with a long tail, and what the model wrote up to its first end token is the answer. Requests,
lengths and engine are the same in both variants; only the order is not. With barriers, the requests of a role
wait until every request of the roles before it has ended: questions, then probes, then responses, then verdicts.

The share of responder prompts that the prefix cache held already is measured apart, on responders alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from spell_megatron.config import Config, load_config
from spell_megatron.corpus import ClusterSampler, StaticQuestions
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.selfplay import Prompts
from spell_megatron.selfplay.pipeline import Job, Pipeline
from spell_megatron.selfplay.ports import Generator
from spell_megatron.types import Question, Rollout, Tokens
from spell_megatron.weights.locate import model_folder
from tokenizer.chat import ChatTokenizer

GROUP = 8
MEDIAN, SIGMA, SHORTEST, LONGEST = 0.75, 1.0, 0.5, 8.0
"""A completion costs its role's token limit times a log-normal factor of this median and spread, within bounds."""
LAYERS = 28
"""Those beyond the model's own add nothing but time: a step's time hardly depends on its batch, as on a GPU."""
CLUSTERS = 3
"""Of the toy world, in one prompt."""
SETTINGS = (
    f"selfplay.group_size={GROUP}",
    "rollout.max_model_len=1024",
    "rollout.max_num_seqs=256",
    "rollout.kv_cache_mib=1024",
)
_QUIET_TURNS = 20
"""Turns of the event loop after which nobody is about to ask for something."""
_depth: ContextVar[int] = ContextVar("depth", default=0)
"""Completions that this task, and those that it came from, have waited for: the role's place in the step."""


class LongTailed:
    """A generator whose completions cost what their seeds say. `engine` must have no stop tokens."""

    def __init__(self, engine: InProcessEngine, ends: Sequence[int]) -> None:
        self._engine, self._ends = engine, frozenset(ends)
        self.requests: Counter[tuple[tuple[int, ...], int]] = Counter()
        """By prompt and seed."""
        self.tokens = 0

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        (seed,) = seeds
        factor = MEDIAN * random.Random(seed).lognormvariate(0.0, SIGMA)
        length = int(max_tokens * min(max(factor, SHORTEST), LONGEST))
        self.requests[tuple(prompt), seed] += 1
        [rollout] = await self._engine.generate(
            prompt, seeds=seeds, max_tokens=length, temperature=temperature, top_p=top_p
        )
        self.tokens += len(rollout.tokens)
        own = rollout.tokens[:max_tokens]
        end = next((place for place, token in enumerate(own, 1) if token in self._ends), None)
        own, logprobs = own[:end], rollout.logprobs[: end or max_tokens]
        return [replace(rollout, tokens=own, logprobs=logprobs, finish="stop" if end else "length")]


class Barriers:
    """A generator that opens one role after the other, each when the one before is done."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._running = 0
        self._held: list[tuple[int, asyncio.Event]] = []
        self._opening: asyncio.Task[None] | None = None
        self.opened: list[int] = []
        """Requests of each phase."""

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        depth, opened = _depth.get(), asyncio.Event()
        self._held.append((depth, opened))
        self._look()
        await opened.wait()
        try:
            return await self._generator.generate(
                prompt, seeds=seeds, max_tokens=max_tokens, temperature=temperature, top_p=top_p
            )
        finally:
            _depth.set(depth + 1)
            self._running -= 1
            self._look()

    def _look(self) -> None:
        if not self._running and (self._opening is None or self._opening.done()):
            self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        for _ in range(_QUIET_TURNS):  # those whose completion has just ended may ask for the next one
            await asyncio.sleep(0)
        first = min((depth for depth, _ in self._held), default=0)
        released = [event for depth, event in self._held if depth == first]
        self._held = [entry for entry in self._held if entry[0] != first]
        self._running += len(released)
        self.opened.append(len(released))
        for event in released:
            event.set()


class Stage:
    """The toy recipe with an engine that never stops by itself."""

    def __init__(self, config: Config, scratch: Path) -> None:
        self.config, self._scratch = config, scratch
        self._folder = model_folder(config.model.path)
        self._codec = ChatTokenizer.load(self._folder)
        self._model = _deep_and_endless(self._folder, scratch / "model")
        self.engine = InProcessEngine(self._model, config.rollout, scratch=scratch / "vllm", stop=())

    def jobs(self, count: int, *, static: bool) -> list[Job]:
        sampler = ClusterSampler(self.config.corpus, self._codec.count, seed=0, folder=self._scratch)
        clusters: Any = StaticQuestions(sampler) if static else sampler
        jobs = []
        for index in range(count):
            (cluster, what), *others = clusters.draw(CLUSTERS)
            documents = (*cluster.documents, *(d for other, _ in others for d in other.documents))
            question = what if isinstance(what, Question) else None
            task = question.task if question else what
            jobs.append(Job(1, 0, index, replace(cluster, documents=documents), task, question=question))
        return jobs

    def run(self, jobs: Sequence[Job], *, barriers: bool, judge: bool = True) -> dict[str, Any]:
        """Play all jobs at once from an empty prefix cache."""
        weights = load_file(self._model / "model.safetensors")
        self.engine.update_weights(weights.items(), self.engine.version + 1)
        longtailed = LongTailed(self.engine, self._codec.eos_ids)
        held = Barriers(longtailed)
        pipeline = Pipeline(
            replace(self.config.selfplay, judge=judge),
            prompts=Prompts(self.config.model.prompts),
            codec=self._codec,
            generator=held if barriers else longtailed,
            seed=0,
            max_model_len=self.config.rollout.max_model_len,
        )

        async def all_jobs() -> None:
            await asyncio.gather(*(pipeline.run(job) for job in jobs))

        before, start = self.engine.stats(), time.perf_counter()
        asyncio.run(all_jobs())
        seconds, after = time.perf_counter() - start, self.engine.stats()
        return {
            "seconds": seconds,
            "tokens": longtailed.tokens,
            "requests": longtailed.requests,
            "phases": held.opened,
            "prompt_tokens": (after.prompt_tokens - before.prompt_tokens) / longtailed.requests.total(),
            "hits": (after.cached_tokens - before.cached_tokens)
            / (after.prompt_tokens - before.prompt_tokens),
        }


def _deep_and_endless(folder: Path, copy: Path) -> Path:
    """The model with layers that add nothing, and without its end token, which vLLM would obey."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    weights, own = load_file(copy / "model.safetensors"), config["num_hidden_layers"]
    last = {name: tensor for name, tensor in weights.items() if name.startswith(f"model.layers.{own - 1}.")}
    for layer in range(own, LAYERS):
        for name, tensor in last.items():
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            weights[name.replace(f".{own - 1}.", f".{layer}.", 1)] = (
                tensor * 0 if silent else tensor
            ).clone()
    save_file(weights, copy / "model.safetensors")
    depth = {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}
    (copy / "config.json").write_text(json.dumps({**config, **depth, "eos_token_id": None}), encoding="utf-8")
    (copy / "generation_config.json").write_text("{}", encoding="utf-8")
    return copy


def measure(questions: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Both variants in turns, after a round that warms up; medians."""
    stage = Stage(load_config("toy", SETTINGS), folder)
    runs: dict[str, list[dict[str, Any]]] = {"barrier": [], "streaming": []}
    try:
        jobs = stage.jobs(questions, static=False)
        for _ in range(rounds + 1):
            for name in runs:
                runs[name].append(stage.run(jobs, barriers=name == "barrier"))
        responders = stage.run(stage.jobs(questions, static=True), barriers=False, judge=False)
    finally:
        stage.engine.close()
    barrier, streaming = (runs[name][-1] for name in runs)
    seconds = {name: median(run["seconds"] for run in made[1:]) for name, made in runs.items()}
    common, every = (
        sum(counts.values())
        for counts in (
            barrier["requests"] & streaming["requests"],
            barrier["requests"] | streaming["requests"],
        )
    )
    return {
        "questions": questions,
        "group_size": GROUP,
        "seconds": seconds,
        "streaming_over_barrier": seconds["streaming"] / seconds["barrier"],
        "tokens": {name: made[-1]["tokens"] for name, made in runs.items()},
        "phases": barrier["phases"],
        "same_requests": common / every,
        "responder_prompt_tokens": responders["prompt_tokens"],
        "prefix_hit_rate": responders["hits"],
        "prefix_hit_rate_all_roles": streaming["hits"],
    }


def main(
    questions: Annotated[int, typer.Option(help="Questions of the step.")] = 24,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(questions, rounds, Path(folder))
    console = Console()
    table = Table("variant", "seconds", "tokens", "tokens/s")
    for name, seconds in result["seconds"].items():
        tokens = result["tokens"][name]
        table.add_row(name, f"{seconds:.2f}", f"{tokens:,}", f"{tokens / seconds:,.0f}")
    console.print(table)
    console.print(
        f"streaming / barrier {result['streaming_over_barrier']:.3f}; requests by phase {result['phases']},"
        f" {result['same_requests']:.1%} the same; of {result['responder_prompt_tokens']:.0f} tokens of a responder's"
        f" prompt {result['prefix_hit_rate']:.1%} came from the prefix cache at G = {GROUP}"
    )
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
