"""What each part of SPELL is worth where there is something left to learn: the hard world, one key changed at a time.

    python -m benchmarks.experiments --seeds 3 [--at-once 2] [--variants spell,no-memory] [--json] [key=value …]

Held-out accuracy is graded by the rule alone, by the links that an answer needs and by the length of the documents;
`best` is pass@k of the held-out samples. The roles are measured against the generator's truth, which no training step
sees, in the first and the last steps. Runs that are over are kept in `--results` and not run again, so that a table can
be interrupted. Intervals are Student's over the seeds, differences from SPELL are paired by seed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.ablations import SPELL, VARIANTS, AtOnce, chosen, kept_results, shown, spread, tell
from benchmarks.toy import trained
from spell_megatron.corpus.worlds import recalled
from spell_megatron.run.record import Journal
from spell_megatron.run.record.metrics import read_metrics
from spell_megatron.selfplay import Episode
from spell_megatron.selfplay.grading import rule_reward

RECIPE = "hard"
_QUOTED = ("selfplay.beyond.quoted=true", "selfplay.max_rounds=24")
"""Of up to sixteen questions one is kept."""
FURTHER: dict[str, tuple[str, ...]] = {
    "paper-memory": ("selfplay.memory_form=paper",),
    "single-vote": ("selfplay.verdict=first",),
    "evidence": ("selfplay.beyond.evidence=0.5",),
    "answerable": ("selfplay.beyond.answerability=2",),
    "noted": ("selfplay.beyond.noted=true",),
    "quoted": _QUOTED,
    "outvoting": ("selfplay.beyond.outvoting=true",),
    "easier": ("selfplay.beyond.peak=0.8",),
    "easier-noted": ("selfplay.beyond.peak=0.8", "selfplay.beyond.noted=true"),
    "easier-quoted": ("selfplay.beyond.peak=0.8", *_QUOTED),
}
ALL = {**VARIANTS, **FURTHER}
ASKED_FOR = (SPELL, "static", "no-memory", "no-questioner-update", "no-verifier-update", "rule-only")
_ENDS = 2
"""Steps at either end of a run in which the roles are measured."""
_FURTHER_LINKS = ("links/2", "links/3", "links/4")
"""As many held-out questions of each: their mean is the accuracy where something has to be found by way of another."""
_LABELS = ("mean", "links/1", *_FURTHER_LINKS, "links/2+")
_LENGTHS = ("length/1x", "length/2x", "length/4x")


def run(seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run: held-out scores at every step where they were taken, the roles' measures, tokens and seconds."""
    began = time.monotonic()
    folder = trained(RECIPE, seed, overrides)[1]
    rows = read_metrics(folder)
    steps = [int(row["step"] or 0) for row in rows if row["step"]]
    return {
        "heldout": {row["step"]: _scores(row) for row in rows if row.get("heldout/mean") is not None},
        "roles": {
            name: roles(episode for step in chosen_steps for episode in Journal(folder, step).read())
            for name, chosen_steps in (("first", steps[:_ENDS]), ("last", steps[-_ENDS:]))
        },
        "generated": sum(row.get("tokens/generated", 0) for row in rows),
        "seconds": time.monotonic() - began,
    }


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies `links/3` and pass@k `best/links/3`, of a row of metrics."""
    kinds = {"heldout": "", "heldout_by": "", "heldout_best": "best/"}
    named = ((name.partition("/"), value) for name, value in row.items())
    return {kinds[kind] + name: value for (kind, _, name), value in named if kind in kinds}


def _with_further(scores: Mapping[str, float]) -> dict[str, float]:
    """With the scores of two links and more."""
    further = {f"{kind}links/2+": [scores[kind + name] for name in _FURTHER_LINKS] for kind in ("", "best/")}
    return {**scores, **{name: fmean(values) for name, values in further.items()}}


def roles(episodes: Iterable[Episode]) -> dict[str, float]:
    """Shares and means over some episodes, measured against the truth.

    `valid` questions; of these, `true` keys, and true keys among those that are `trained` on; `understood` ones, which
    have an answer in this world (the others have no true key); of these, mean `links` and `documents`, and `verifier`:
    majorities that say what an answer is worth by the true key, and `rule`: the same of the rule with the questioner's
    own reference.
    """
    found: dict[str, list[float]] = {
        name: []
        for name in ("valid", "understood", "true", "trained", "links", "documents", "verifier", "rule")
    }
    for episode in episodes:
        question = episode.question
        found["valid"].append(question is not None)
        if question is None:
            continue
        world, cluster = recalled(episode.cluster)
        truth, reach = world.truth(cluster, question), world.reach(cluster, question)
        true = truth == world.plain(question.answer)
        found["understood"].append(truth is not None)
        found["true"].append(true)
        if episode.kept:
            found["trained"].append(true)
        if truth is None or reach is None:
            continue
        found["links"].append(reach.links)
        found["documents"].append(reach.documents)
        for response in episode.responses:
            right = rule_reward(question.task, response.text, replace(question, answer=truth))
            found["rule"].append((response.rule > 0) == (right > 0))
            if response.verdict is not None:
                found["verifier"].append(bool(response.verdict) == (right > 0))
    return {name: fmean(values) for name, values in found.items() if values}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By variant: what a run changed, by name of score; the same against SPELL; the roles; what it cost."""
    made = {}
    base = {row["seed"]: row for row in rows if row["variant"] == SPELL}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = {row["seed"]: row for row in rows if row["variant"] == variant}
        ends = [_ends(row) for row in own.values()]
        names = list(ends[0][0])
        pairs = [(_ends(own[seed])[1], _ends(base[seed])[1]) for seed in own if seed in base]
        made[variant] = {
            "seeds": len(own),
            "before": {name: fmean(before[name] for before, _ in ends) for name in names},
            "after": {name: fmean(after[name] for _, after in ends) for name in names},
            "difference": {name: spread([b[name] - a[name] for a, b in ends]) for name in names},
            "against_spell": {name: spread([a[name] - b[name] for a, b in pairs]) for name in names},
            "roles": {
                end: {
                    name: fmean(row["roles"][end][name] for row in own.values() if name in row["roles"][end])
                    for name in dict.fromkeys(name for row in own.values() for name in row["roles"][end])
                }
                for end in ("first", "last")
            },
            "generated": fmean(row["generated"] for row in own.values()),
            "minutes": fmean(row["seconds"] for row in own.values()) / 60,
        }
    return made


def _ends(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Scores before the first and after the last step."""
    taken = sorted(row["heldout"].items(), key=lambda entry: int(entry[0]))
    return _with_further(taken[0][1]), _with_further(taken[-1][1])


def tables(summary: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Accuracy, pass@k with lengths, and the roles."""
    gains = Table("variant", "seeds", "before", "after", *(f"Δ {name}" for name in _LABELS), "against spell")
    reach = Table(
        "variant",
        *(f"Δ {name}" for name in _LENGTHS),
        "best before",
        "best after",
        "Δ best",
        "Δ best links/2+",
    )
    parts = ("valid", "understood", "true", "trained", "links", "documents", "verifier", "rule")
    played = Table("variant", *parts, "tokens", "minutes")
    for variant, row in summary.items():
        change = row["difference"]
        gains.add_row(
            variant,
            str(row["seeds"]),
            f"{row['before']['mean']:.3f}",
            f"{row['after']['mean']:.3f}",
            *(shown(change[name]) for name in _LABELS),
            shown(row["against_spell"]["mean"]) if variant != SPELL else "",
        )
        reach.add_row(
            variant,
            *(shown(change[name]) for name in _LENGTHS),
            f"{row['before']['best/mean']:.3f}",
            f"{row['after']['best/mean']:.3f}",
            shown(change["best/mean"]),
            shown(change["best/links/2+"]),
        )
        first, last = row["roles"]["first"], row["roles"]["last"]
        played.add_row(
            variant,
            *(
                f"{first[name]:.2f} → {last[name]:.2f}" if name in first and name in last else ""
                for name in parts
            ),
            f"{row['generated'] / 1e6:.2f} M",
            f"{row['minutes']:.1f}",
        )
    return [gains, reach, played]


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe, for all")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 3,
    variants: Annotated[str, typer.Option(help=f"Some of {', '.join(ALL)}; or all.")] = ",".join(ASKED_FOR),
    kept: Annotated[Path, typer.Option("--results", help="Where finished runs are kept.")] = Path(
        "runs/experiments.jsonl"
    ),
    at_once: AtOnce = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
) -> None:
    """Run the hard recipe with parts changed and print the tables."""
    rows, failed = kept_results(chosen(variants, ALL), seeds, overrides or [], kept, ALL, run, at_once)
    summary = summarise(rows)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables(summary):
        console.print(table)
    if as_json:
        sys.stdout.write(json.dumps({"seeds": seeds, "variants": summary}) + "\n")
    tell(failed)


if __name__ == "__main__":
    typer.run(main)
