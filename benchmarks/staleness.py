"""Time of training steps whose rollouts come between the updates (staleness 0), and beside them (staleness 1).

    python -m benchmarks.staleness [--steps 3] [--json] [key=value …]

The toy recipe with one real server. Half of the machine's cores are the server's and half the learner's, in both
runs: engines apart from the trainer, as on a cluster. The learning rate is next to nothing, so that both runs
sample the same and do the same work. What overlapping can save at most is the shorter of the two: the table also
says what the first run's own phases would come to if they overlapped without loss.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import apart
from spell_megatron.config import load_config
from spell_megatron.run.opening import open_run
from spell_megatron.run.record import read_metrics

SETTINGS = (
    "rollout.servers.count=1",
    "policy.optimizer.lr=1e-12",
    "policy.loss.importance_cap=2.0",
    "record.checkpoint_every=0",
    "heldout.questions=0",
)


def measure(overrides: Sequence[str]) -> dict[str, Any]:
    """Seconds of one run's steps, from the first request to the last row, and its rows of metrics.

    They are steps 2 and following: the first resync takes vLLM into this process, and comes before.
    """
    config, cores = load_config("toy", overrides), sorted(os.sched_getaffinity(0))
    engine, learner = cores[: len(cores) // 2], cores[len(cores) // 2 :]
    _move(engine)
    with open_run(config, None) as run:
        _move(learner)  # the server stays where it was started
        torch.set_num_threads(len(learner))
        run.resync(1)
        began = time.monotonic()
        for step in range(2, config.steps + 1):
            collected = run.collect(step)
            updated = run.update(collected)
            run.resync(step)
            run.record(collected, updated, {})
        return {"seconds": time.monotonic() - began, "rows": read_metrics(run.folder)}


def overlapped(rows: Sequence[dict[str, Any]]) -> float:
    """Seconds of the steps if every play but the first ran beside the update before it."""
    plays: list[float] = [row["time/rollout"] for row in rows]
    trains: list[float] = [row["time/update"] + row["time/resync"] for row in rows]
    return (
        plays[0]
        + sum(max(train, play) for (train, _), (_, play) in pairwise(zip(trains, plays, strict=True)))
        + trains[-1]
    )


def _move(cores: Collection[int]) -> None:
    """Put every thread of this process on some cores; processes that it starts later inherit them."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a run.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Measure both and print the table."""
    if len(os.sched_getaffinity(0)) < 2:
        raise typer.BadParameter("this needs two cores, one for the server and one for the learner")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for staleness in (0, 1):
            chosen = [*SETTINGS, f"steps={steps + 1}", f"runs={folder}", *(overrides or [])]
            runs.append(apart(measure, [*chosen, f"selfplay.max_staleness={staleness}"]))
    table = Table("staleness", "seconds", "playing", "waited for", "updates", "resyncs", "mean age")
    for staleness, run in enumerate(runs):
        sums = [
            sum(row[f"time/{name}"] for row in run["rows"])
            for name in ("rollout", "play", "update", "resync")
        ]
        age = sum(row["staleness/mean"] for row in run["rows"]) / steps
        table.add_row(str(staleness), *(f"{value:.1f}" for value in (run["seconds"], *sums)), f"{age:.2f}")
    ideal = overlapped(runs[0]["rows"])
    console = Console(stderr=True)
    console.print(table)
    console.print(f"{steps} steps; the first run's phases without loss: {ideal:.1f} s")
    if as_json:
        seconds = {f"seconds_{staleness}": run["seconds"] for staleness, run in enumerate(runs)}
        sys.stdout.write(json.dumps({**seconds, "seconds_ideal": ideal, "steps": steps}) + "\n")


if __name__ == "__main__":
    typer.run(main)
