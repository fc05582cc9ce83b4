"""What each part of SPELL is worth in the toy world: the recipe with one key changed, several seeds each.

    python -m benchmarks.ablations --seeds 3 [--at-once 2] [--variants spell,no-memory] [--json] [key=value …]

Held-out accuracy is graded by the rule alone. Runs that are over are kept in `--results` and not run again, so
that a table can be interrupted, and widened by further variants and seeds. Intervals are Student's over the
seeds; the last column pairs a variant with SPELL seed by seed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from subprocess import CalledProcessError
from threading import Lock
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.toy import interval, run, score
from spell_megatron.corpus.toy import TASKS
from spell_megatron.run.record.folder import JsonLines, read_lines
from spell_megatron.types import SpellError

SPELL = "spell"
Variants = Mapping[str, tuple[str, ...]]
VARIANTS: Variants = {
    SPELL: (),
    "no-memory": ("selfplay.memory=0",),
    "no-verifier-update": ("selfplay.train_verifier=false",),
    "static": (  # the rule alone, on fixed questions whose references the world's generator wrote
        "selfplay.static_questions=true",
        "selfplay.judge=false",
        "selfplay.train_questioner=false",
        "selfplay.max_rounds=80",  # nobody makes the questions harder: at last few are left that it does not know
    ),
    "majority": ("selfplay.verifier_consistency=maj",),
    "no-grounding": ("selfplay.grounding=false",),
    "no-questioner-update": ("selfplay.train_questioner=false",),
    "rule-only": ("selfplay.judge=false",),
    "linear-reward": ("selfplay.questioner_reward=linear",),
    "reverse-reward": ("selfplay.questioner_reward=reverse",),
}
ASKED_FOR = (SPELL, "no-memory", "no-verifier-update", "static")
AtOnce = Annotated[int, typer.Option(min=1, help="Runs side by side, which share the cores.")]
NAMES = (*TASKS, "mean")
_KEPT = ("heldout_before", "heldout_after", "generated")


def chosen(names: str, variants: Variants = VARIANTS) -> list[str]:
    """Names of variants from a list with commas; `all` of them."""
    wanted = list(variants) if names == "all" else [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in variants]:
        raise SpellError(f"no variant {unknown[0]!r}; there are: {', '.join(variants)}, all")
    return wanted


def kept_results(
    names: Sequence[str],
    seeds: int,
    overrides: Sequence[str],
    kept: Path,
    variants: Variants,
    run: Callable[[int, Sequence[str]], dict[str, Any]],
    at_once: int = 1,
) -> tuple[list[dict[str, Any]], list[str]]:
    """What `run(seed, overrides)` says of every variant and seed, with its `variant`, `seed` and `overrides`.

    Every variant of a seed before the next seed, so that an interrupted table is still one of pairs; `at_once` runs
    side by side. A run whose result stands in `kept` is not run again. One that fails leaves the others alone; the
    second list says which did and why.
    """
    known = {_key(row["variant"], row["seed"], row["overrides"]): row for row in read_lines(kept)}
    lines, writing = JsonLines(kept), Lock()

    def result(seed: int, name: str) -> dict[str, Any]:
        row = known.get(_key(name, seed, overrides))
        if row is None:
            found = run(seed, [*variants[name], *overrides])
            row = {"variant": name, "seed": seed, "overrides": list(overrides), **found}
            with writing:
                lines.append(row)
                lines.sync()
        return row

    if at_once > 1:  # small models hardly gain by a second thread
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // at_once))
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    pool = ThreadPoolExecutor(at_once)
    asked = {(name, seed): pool.submit(result, seed, name) for seed in range(seeds) for name in names}
    try:
        for (name, seed), future in asked.items():
            try:
                rows.append(future.result())
            except (SpellError, CalledProcessError) as error:
                failed.append(f"{name}, seed {seed}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
        lines.close()
    return rows, failed


def tell(failed: Sequence[str]) -> None:
    """Name the runs that failed; the exit code is 1 where there are any."""
    for fault in failed:
        Console(stderr=True).print(f"[red]failed:[/] {escape(fault)}")
    if failed:
        raise typer.Exit(1)


def _run(seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Held-out scores and tokens `generated` of one run of the toy recipe."""
    result = run(seed, overrides)
    return {name: result[name] for name in _KEPT}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By variant: mean scores before and after, and what the run changed, `mean` with `half_width`."""
    summary: dict[str, dict[str, Any]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = {row["seed"]: row for row in rows if row["variant"] == variant}
        base = {row["seed"]: row for row in rows if row["variant"] == SPELL}
        pairs = [(own[seed], base[seed]) for seed in own if seed in base]
        summary[variant] = {
            "seeds": len(own),
            "before": {
                name: fmean(score(row["heldout_before"], name) for row in own.values()) for name in NAMES
            },
            "after": {
                name: fmean(score(row["heldout_after"], name) for row in own.values()) for name in NAMES
            },
            "difference": {name: spread([_gain(row, name) for row in own.values()]) for name in NAMES},
            "against_spell": spread(
                [score(a["heldout_after"], "mean") - score(b["heldout_after"], "mean") for a, b in pairs]
            ),
            "generated": fmean(row["generated"] for row in own.values()),
        }
    return summary


def table(summary: dict[str, dict[str, Any]]) -> Table:
    made = Table("variant", "seeds", "before", "after", "difference", *TASKS, "against spell", "tokens")
    for variant, row in summary.items():
        made.add_row(
            variant,
            str(row["seeds"]),
            f"{row['before']['mean']:.3f}",
            f"{row['after']['mean']:.3f}",
            *(shown(row["difference"][name]) for name in ("mean", *TASKS)),
            shown(row["against_spell"]) if variant != SPELL else "",
            f"{row['generated'] / 1e6:.2f} M",
        )
    return made


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe, for all")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 3,
    variants: Annotated[str, typer.Option(help=f"Some of {', '.join(VARIANTS)}; or all.")] = ",".join(
        ASKED_FOR
    ),
    kept: Annotated[Path, typer.Option("--results", help="Where finished runs are kept.")] = Path(
        "runs/ablations.jsonl"
    ),
    at_once: AtOnce = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Run the toy recipe with parts left out and print the table."""
    rows, failed = kept_results(chosen(variants), seeds, overrides or [], kept, VARIANTS, _run, at_once)
    summary = summarise(rows)
    Console(width=None if sys.stdout.isatty() else 160).print(table(summary))
    if as_json:
        sys.stdout.write(json.dumps({"seeds": seeds, "variants": summary}) + "\n")
    tell(failed)


def _key(variant: str, seed: int, overrides: Sequence[str]) -> str:
    return json.dumps([variant, seed, list(overrides)])


def _gain(row: dict[str, Any], name: str) -> float:
    return score(row["heldout_after"], name) - score(row["heldout_before"], name)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half-width of the interval; None where there is nothing to take them of."""
    if not values:
        return {"mean": None, "half_width": None}
    mean, half = interval(values)
    return {"mean": mean, "half_width": half if half == half else None}


def shown(spread: dict[str, float | None]) -> str:
    mean, half = spread["mean"], spread["half_width"]
    if mean is None:
        return ""
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if half is not None else "")


if __name__ == "__main__":
    typer.run(main)
