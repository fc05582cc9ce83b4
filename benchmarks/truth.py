"""Whether a run's questions have true keys, and what speaks for false ones: by step, memory, reach and reward.

    python -m benchmarks.truth RUN [RUN …]

RUN is the folder of a run on a generated world. The generator's truth, which no training step sees, is compared with
the questioner's own reference. A question that the world does not understand has no answer there, and no true key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from spell_megatron.corpus.worlds import recalled
from spell_megatron.run.record import Journal, RunFolder
from spell_megatron.run.record.metrics import read_metrics
from spell_megatron.selfplay import Episode
from spell_megatron.selfplay.lookup import quotes, states
from spell_megatron.types import Document


@dataclass(frozen=True)
class Posed:
    """A valid question of a run."""

    episode: Episode
    read: tuple[Document, ...]
    """By the questioner."""
    understood: bool
    """Whether the world has an answer to it."""
    true: bool
    """Whether its reference is that answer."""
    links: int
    """Facts to be found one after another; 0 where it is not understood or the world does not count."""
    late: bool
    """Whether it was asked in the second half of the run."""


def posed(folder: RunFolder) -> Iterator[Posed]:
    """Every valid question of a run, in the order of its steps."""
    steps = [int(row["step"]) for row in read_metrics(folder) if row["step"]]
    for place, step in enumerate(steps):
        for episode in Journal(folder, step).read():
            if episode.question is None:
                continue
            world, cluster = recalled(episode.cluster)
            truth = world.truth(cluster, episode.question)
            true = truth == world.plain(episode.question.answer)
            read = tuple(cluster.documents[index] for index in episode.documents)
            reach = world.reach(cluster, episode.question)
            links = reach.links if reach else 0
            yield Posed(episode, read, truth is not None, true, links, 2 * place >= len(steps))


VIEWS: dict[str, Callable[[Posed], str]] = {
    "step": lambda one: f"{one.episode.step:3d}",
    "remembered": lambda one: str(len(one.episode.history)),
    "links": lambda one: f"{one.links or '–'} {'late' if one.late else 'early'}",
    "documents read": lambda one: str(len(one.episode.documents)),
    "noted": lambda one: "yes" if states(one.episode.asked_text, one.episode.posed) else "no",
    "quoted": lambda one: "yes" if quotes(one.episode.asked_text, one.episode.posed, one.read) else "no",
    "task": lambda one: one.episode.task,
    "mean reward": lambda one: (
        f"{round(4 * one.episode.mean_reward) / 4:.2f}" if one.episode.answered else "none"
    ),
}


def table(name: str, found: Iterable[Posed]) -> Table:
    """A row for each value of a view: questions, understood ones, true ones, and what true and false keys earned."""
    made = Table(
        name, "questions", "understood", "true", "kept if true", "kept if false", "reward if true", "if false"
    )
    rows: dict[str, list[Posed]] = defaultdict(list)
    for one in found:
        rows[VIEWS[name](one)].append(one)
    for value, ones in sorted(rows.items()):
        sides = [[one.episode for one in ones if one.true is side] for side in (True, False)]
        made.add_row(
            value,
            str(len(ones)),
            _share(one.understood for one in ones),
            _share(one.true for one in ones),
            *(_share(episode.kept for episode in side) for side in sides),
            *(_share(e.reward for e in side if e.reward is not None) for side in sides),
        )
    return made


def _share(values: Iterable[float]) -> str:
    found = list(values)
    return f"{fmean(found):.2f}" if found else ""


def main(runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")]) -> None:
    """Print a table for each view of the runs' questions."""
    found = [one for run in runs for one in posed(RunFolder.open(run))]
    for name in VIEWS:
        Console().print(table(name, found))


if __name__ == "__main__":
    typer.run(main)
