"""A step of self-play with barriers between the roles, in units of the same step without them.

    python -m benchmarks.pipeline [--questions 32] [--rounds 1] [--json]

The toy model plays the toy world on a real vLLM engine in this process. Its prompts are short: two clusters make
one. Its answers are short and all alike, so lengths are imposed: every completion goes on for as many tokens as
its seed says, with a long tail, and what the model wrote up to its first end token is the answer. With barriers,
the requests of a role wait until every request of the roles before it has ended: questions, then probes, then
responses, then verdicts. Engine, questions, seeds and lengths are the same in both variants.

A step asks more questions than it keeps. Without barriers it ends when enough are kept, and what it did not begin
by then is never asked; with them nothing is known before the last role. That is one half of the difference. The
other, the order alone, is measured apart: on a step that needs an answer to every request.

The share of responder prompts that the prefix cache held already is measured on responders alone.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.generators import Barriers, LongTailed
from spell_megatron.config import Config, load_config
from spell_megatron.corpus import ClusterSampler, StaticQuestions
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.selfplay import SelfPlay, StarvedError, prompts_of
from spell_megatron.selfplay.play import Clusters
from spell_megatron.types import Cluster, Group, Question
from spell_megatron.weights.locate import model_folder
from tokenizer.chat import ChatTokenizer

GROUP = 8
KEPT = 128 / 480
"""The share of questions that a step keeps, as in the paper."""
IN_FLIGHT = 2
"""Questions under way at a time, for every one that is kept. With barriers all have to be."""
LAYERS = 28
"""Those beyond the model's own add nothing but time, so that a step's depends less on its batch, as on a GPU."""
CLUSTERS = 2
"""Clusters of the toy world in one prompt."""
SETTINGS = (
    f"selfplay.group_size={GROUP}",
    "rollout.max_model_len=1024",
    "rollout.max_num_seqs=256",
    "rollout.kv_cache_mib=1024",
)


@dataclass(frozen=True)
class Run:
    """One step: what it took, what it asked for, what it came to."""

    seconds: float
    tokens: int
    requests: Counter[tuple[tuple[int, ...], int]]
    phases: list[int]
    prompt_tokens: float
    """Tokens of a request, on average."""
    hits: float
    """Share of prompt tokens that the prefix cache held."""
    samples: Counter[tuple[int, ...]]
    """Requests of the batch."""


class Wide:
    """Clusters of the toy world, several in one."""

    def __init__(self, clusters: Clusters) -> None:
        self._clusters = clusters
        self.state, self.restore = clusters.state, clusters.restore

    def draw(self, n: int) -> list[tuple[Cluster, str | Question]]:
        return [self._one() for _ in range(n)]

    def _one(self) -> tuple[Cluster, str | Question]:
        (first, what), *others = self._clusters.draw(CLUSTERS)
        documents = (*first.documents, *(d for other, _ in others for d in other.documents))
        return replace(first, documents=documents), what


class Stage:
    """The toy recipe with an engine that never stops by itself."""

    def __init__(self, config: Config, scratch: Path) -> None:
        self.config, self._scratch = config, scratch
        folder = model_folder(config.model.path)
        self._codec = ChatTokenizer.load(folder)
        self._model = _deep_and_endless(folder, scratch / "model")
        self.engine = InProcessEngine(self._model, config.rollout, scratch=scratch / "vllm", stop=())

    def play(self, asked: int, kept: int, *, barriers: bool = False, responders: bool = False) -> Run:
        """A step that asks `asked` questions to keep `kept`, from an empty prefix cache.

        With `responders` the questions are given and nobody judges.
        """
        weights = load_file(self._model / "model.safetensors")
        self.engine.update_weights(weights.items(), self.engine.version + 1)
        longtailed = LongTailed(self.engine, self._codec.eos_ids)
        held = Barriers(longtailed)
        sampler: Any = ClusterSampler(self.config.corpus, self._codec.count, seed=0, folder=self._scratch)
        step = SelfPlay(
            replace(
                self.config.selfplay,
                questions=kept,
                round_questions=asked,
                max_rounds=1,
                concurrency=asked if barriers else IN_FLIGHT * kept,
                judge=not responders,
            ),
            prompts=prompts_of(self.config),
            codec=self._codec,
            generator=held if barriers else longtailed,
            clusters=Wide(StaticQuestions(sampler) if responders else sampler),
            seed=0,
            max_model_len=self.config.rollout.max_model_len,
        )
        before, start = self.engine.stats(), time.perf_counter()
        groups = asyncio.run(_groups(step, endless=kept > asked))
        seconds, after = time.perf_counter() - start, self.engine.stats()
        prompts = after.prompt_tokens - before.prompt_tokens
        return Run(
            seconds,
            after.generated_tokens - before.generated_tokens,
            longtailed.requests,
            held.opened,
            prompts / longtailed.requests.total(),
            (after.cached_tokens - before.cached_tokens) / prompts,
            Counter((*group.prompt, *sample.tokens) for group in groups for sample in group.samples),
        )


async def _groups(step: SelfPlay, *, endless: bool) -> Sequence[Group]:
    """The batch's groups; none of a step that wants more than it asks, which ends with its last request."""
    try:
        return (await step.play(1)).batch.train.groups
    except StarvedError:
        if not endless:
            raise
        return ()


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
    """Both variants in turns, after a small step that warms up; medians."""
    stage = Stage(load_config("toy", SETTINGS), folder)
    kept = {"step": round(questions * KEPT), "every request": questions + 1}
    runs: dict[str, dict[str, list[Run]]] = {what: {"barrier": [], "streaming": []} for what in kept}
    try:
        stage.play(2, 3)
        for _ in range(rounds):
            for what, made in runs.items():
                for name, done in made.items():
                    done.append(stage.play(questions, kept[what], barriers=name == "barrier"))
        responders = stage.play(questions, questions + 1, responders=True)
    finally:
        stage.engine.close()
    seconds = {
        what: {name: median(run.seconds for run in done) for name, done in made.items()}
        for what, made in runs.items()
    }
    ratios = {what: times["streaming"] / times["barrier"] for what, times in seconds.items()}
    step, every = ({name: done[-1] for name, done in made.items()} for made in runs.values())
    return {
        "questions": questions,
        "kept": kept["step"],
        "group_size": GROUP,
        "streaming_over_barrier": ratios["step"],
        "streaming_over_barrier_every_request": ratios["every request"],
        "same_batch": _overlap(step["barrier"].samples, step["streaming"].samples),
        "same_requests": _overlap(every["barrier"].requests, every["streaming"].requests),
        "phases": every["barrier"].phases,
        "seconds": seconds,
        "tokens": {
            what: {name: done[-1].tokens for name, done in made.items()} for what, made in runs.items()
        },
        "prefix_hit_rate": responders.hits,
        "responder_prompt_tokens": responders.prompt_tokens,
    }


def _overlap(one: Counter[Any], other: Counter[Any]) -> float:
    """Common entries over all entries."""
    return (one & other).total() / (one | other).total()


def main(
    questions: Annotated[int, typer.Option(help="Questions that the step asks.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(questions, rounds, Path(folder))
    console = Console()
    table = Table("", "variant", "seconds", "tokens", "streaming / barrier")
    for what, ratio in (
        ("step", result["streaming_over_barrier"]),
        ("every request", result["streaming_over_barrier_every_request"]),
    ):
        for name, seconds in result["seconds"][what].items():
            shown = f"{ratio:.3f}" if name == "streaming" else ""
            table.add_row(what, name, f"{seconds:.2f}", f"{result['tokens'][what][name]:,}", shown)
    console.print(table)
    same = f"{result['same_requests']:.1%} of the requests, {result['same_batch']:.1%} of the batch"
    console.print(
        f"{result['kept']} of {questions} questions kept; requests by phase {result['phases']}; equal: {same}"
    )
    console.print(
        f"of {result['responder_prompt_tokens']:.0f} prompt tokens of a responder {result['prefix_hit_rate']:.1%}"
        f" came from the prefix cache, at G = {GROUP}"
    )
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
