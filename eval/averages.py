"""The paper's averages over benchmarks, and the columns that they are averages of.

Table 1 averages FOUR columns, one of which is itself the mean of three multi-hop sets; the authors' code prints
the mean of all six. Both are given, under names that tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.benchmarks import find
from eval.paper import Columns, tables
from eval.results import Result
from eval.statistics import Figure, figure

RELEASE = "mean of six"
"""The unweighted mean that the authors' code prints."""


@dataclass(frozen=True, slots=True)
class PartScores:
    """The questions of one part: their scores, and the stratum of each where the part is a mean of several."""

    scores: Sequence[float]
    strata: Sequence[str]
    complete: bool


def averages(results: Sequence[Result]) -> dict[str, dict[str, Figure]]:
    """Every average of the paper, by its name and the input limit, where all of its columns were measured."""
    named = {table.average: table.columns for table in tables()}
    [(first, main), *_] = named.items()
    six = {part: (part,) for parts in main.values() for part in parts}
    wanted = {first: main, RELEASE: six, **named}
    found = {}
    for name, columns in wanted.items():
        figures = {
            str(limit): mean for limit in limits(results) if (mean := average(results, columns, limit))
        }
        if figures:
            found[name] = figures
    return found


def limits(results: Sequence[Result]) -> list[int | None]:
    """The input limits that were measured; None stands for benchmarks without one."""
    return sorted({result.max_input for result in results}, key=lambda limit: limit or 0)


def average(results: Sequence[Result], columns: Columns, limit: int | None) -> Figure | None:
    """Unweighted mean of columns, each the unweighted mean of its parts; None where one was not measured."""
    scores: list[float] = []
    strata: list[str] = []
    weights: dict[str, float] = {}
    complete = True
    for parts in columns.values():
        for part in parts:
            if (sample := _part(results, part, limit)) is None:
                return None
            names = sorted(set(sample.strata))
            weights |= {f"{part}:{name}": 1 / (len(columns) * len(parts) * len(names)) for name in names}
            scores += sample.scores
            strata += [f"{part}:{name}" for name in sample.strata]
            complete &= sample.complete
    return figure(scores, strata, weights, complete)


def _part(results: Sequence[Result], part: str, limit: int | None) -> PartScores | None:
    """What was measured of `mrcr/needles=2` or of `docmath` at a limit; None where that is nothing."""
    name, _, subset = part.partition("/")
    label, _, value = subset.partition("=")
    [macro] = [benchmark.macro for benchmark in find([name])]
    for result in results:
        if (result.benchmark, result.max_input) == (name, limit):
            chosen = [
                item for item in result.questions if not label or result.labels[item].get(label) == value
            ]
            strata = [_stratum(result.labels[item], macro) for item in chosen]
            scores = [result.questions[item] for item in chosen]
            return PartScores(scores, strata, result.complete) if chosen else None
    return None


def _stratum(labels: Mapping[str, str], macro: str) -> str:
    return labels.get(macro, "") if macro else ""
