"""Self-play on the toy world over several seeds: held-out accuracy, and how truthful the roles are.

    python -m benchmarks.toy --seeds 3 [--json] [key=value …]

Every run is the shipped recipe in a process of its own. The interval is Student's over the seeds.
Ground truth comes from the world's generator; no training step sees it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from spell_megatron.base.interpreter import python
from spell_megatron.corpus.toy import TASKS
from spell_megatron.corpus.worlds import recalled
from spell_megatron.run.record import Journal, RunFolder
from spell_megatron.run.record.metrics import read_metrics
from spell_megatron.selfplay import Episode

_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""97.5 % quantile of Student's t by number of runs."""


_ASK = ("steps=1", "selfplay.questions=500", "selfplay.round_questions=1000", "heldout.questions=0")
"""One step that asks the untrained model many questions: its roles are measured on what came before the update."""


def trained(recipe: str, seed: int, overrides: Sequence[str]) -> tuple[dict[str, Any], RunFolder]:
    """One run of a recipe in a process of its own: what `train --json` says, and the run's folder."""
    command = python("spell_megatron.tools.cli", "train", recipe, f"seed={seed}", *overrides, "--json")
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result, RunFolder.open(Path(result["run_dir"]))


def run(seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run of the recipe: what it says, tokens generated, the roles' truthfulness in the last step."""
    result, folder = trained("toy", seed, overrides)
    rows = read_metrics(folder)
    result["heldout"] = {row["step"]: row["heldout/mean"] for row in rows if "heldout/mean" in row}
    result["generated"] = sum(row.get("tokens/generated", 0) for row in rows)
    result["roles"] = roles(Journal(folder, result["steps"]).read())
    return result


def roles(episodes: Iterable[Episode]) -> dict[str, float]:
    """Shares: valid questions, valid ones with a true key (by task), answers on which the graders differ."""
    valid: dict[str, list[bool]] = defaultdict(list)
    true: dict[str, list[bool]] = defaultdict(list)
    differ: list[bool] = []
    for episode in episodes:
        question = episode.question
        valid[episode.task].append(question is not None)
        if question is not None:
            world, cluster = recalled(episode.cluster)
            truth = world.truth(cluster, question)
            true[episode.task].append(truth == world.plain(question.answer))
        differ += [r.verdict != r.rule for r in episode.responses if r.verdict is not None]
    return {
        **{f"valid/{task}": fmean(valid[task]) for task in TASKS if valid[task]},
        **{f"true/{task}": fmean(true[task]) for task in TASKS if true[task]},
        "differ": fmean(differ) if differ else 0.0,
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval."""
    half = (
        _STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))
        if len(values) in _STUDENT
        else math.nan
    )
    return fmean(values), half


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe")] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Run the toy recipe with several seeds and print the table."""
    results = [run(seed, overrides or []) for seed in range(seeds)]
    console = Console()
    table = Table("held-out", "before", "after", "difference", "95 %")
    summary: dict[str, Any] = {"seeds": seeds, "runs": results, "difference": {}}
    for name in (*TASKS, "mean"):
        before = [score(result["heldout_before"], name) for result in results]
        after = [score(result["heldout_after"], name) for result in results]
        mean, half = interval([b - a for a, b in zip(before, after, strict=True)])
        table.add_row(name, f"{fmean(before):.3f}", f"{fmean(after):.3f}", f"{mean:+.3f}", f"± {half:.3f}")
        summary["difference"][name] = {"mean": mean, "half_width": half}
    console.print(table)
    curve = Table("step", *(f"seed {seed}" for seed in range(seeds)))
    for step in results[0]["heldout"]:
        curve.add_row(str(step), *(f"{result['heldout'].get(step, math.nan):.3f}" for result in results))
    console.print(curve)
    start = run(0, [*(overrides or []), *_ASK])["roles"]
    summary["roles"] = {"before": start, "after": [result["roles"] for result in results]}
    shares = Table("share", "before", "last step")
    for name, share in start.items():
        shares.add_row(
            name, f"{share:.2f}", f"{fmean(result['roles'].get(name, 0.0) for result in results):.2f}"
        )
    console.print(shares)
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")


def score(heldout: dict[str, Any], name: str) -> float:
    """The score of one task, or the `mean`."""
    return float(heldout["mean"] if name == "mean" else heldout["by_task"][name])


if __name__ == "__main__":
    typer.run(main)
