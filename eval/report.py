"""Everything that was measured of one model: JSON for machines, Markdown for people, a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.averages import averages
from eval.markdown import INCOMPLETE, literal, marked, number, percent, plain, table
from eval.plot import plot
from eval.results import Result, whole
from eval.runner import Settings
from eval.statistics import Figure
from spell_megatron.base.terminal import tidy

_SAMPLING = {
    "samples": "samples",
    "temperature": "temperature",
    "top_p": "top-p",
    "max_tokens": "output tokens",
}
"""Settings that tables name where they are not the protocol's."""


@dataclass
class Report:
    """Everything that was measured of one model."""

    model: str
    settings: dict[str, Any]
    results: list[Result]
    averages: dict[str, dict[str, Figure]]
    """The paper's averages by name and input limit."""

    @property
    def protocol(self) -> str:
        return str(self.settings["protocol"])

    @property
    def asked(self) -> str:
        """How the questions were asked and scored, as the tables' heads name it."""
        usual = asdict(Settings())
        given = {**usual, **self.settings}
        limit = given["limit"]
        named = [
            *(f"{name} {given[name]}" for name in ("protocol", "mode")),
            *(["thinking"] if given["thinking"] else []),
            *([f"at most {limit} questions of each"] if limit else []),
            *(f"{words} {given[key]}" for key, words in _SAMPLING.items() if given[key] != usual[key]),
        ]
        return ", ".join(named)

    @property
    def complete(self) -> bool:
        return bool(self.results) and all(result.complete for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """JSON values only; a figure that does not exist is null."""
        return plain({**asdict(self), "complete": self.complete})

    def write(self, folder: Path) -> None:
        """`report.json`, `report.md` and `report.png` below `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(
            json.dumps(self.to_json(), indent=1, ensure_ascii=False), encoding="utf-8", errors="replace"
        )
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        plot({self.model: self.results}, folder / "report.png")

    def markdown(self) -> str:
        lines = [f"# {literal(self.model)}", "", *_main_table(self), *_averages(self), *_details(self)]
        return tidy("\n".join(lines)) + "\n"


def read_report(path: Path) -> Report:
    """A report from its `report.json`. One of an earlier version does not say of each figure whether it is complete:
    its counts do."""
    values = json.loads((path / "report.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    results = [_result(row) for row in values["results"]]
    said = values["averages"]
    if all("complete" in value for figures in said.values() for value in figures.values()):
        means = {name: _figures(figures, True) for name, figures in said.items()}
    else:
        means = averages(results)
    return Report(values["model"], values["settings"], results, means)


def _result(row: Mapping[str, Any]) -> Result:
    complete = whole(row["counts"])
    return Result(
        **{
            **row,
            "mean": _from_json(row["mean"], complete),
            "rule": _from_json(row["rule"], complete),
            "bounds": tuple(map(_number_or_nan, row["bounds"])),
            "best_of": {int(k): _number_or_nan(v) for k, v in row["best_of"].items()},
            "best_of_bootstrap": {int(k): _number_or_nan(v) for k, v in row["best_of_bootstrap"].items()},
            "macro": _figures(row["macro"], complete),
            "subsets": {name: _figures(values, complete) for name, values in row["subsets"].items()},
        }
    )


def _main_table(report: Report) -> list[str]:
    most = max((len(result.best_of) for result in report.results), default=0)
    ks = sorted({k for k in (1, 2, 4, most) if 1 < k <= most})
    head = [
        report.asked,
        "score [95 %]",
        "rule only",
        *(f"pass@{k}" for k in ks),
        "questions × samples",
        "scored by",
    ]
    rows = []
    for result in report.results:
        passes = [number(result.best_of.get(k, math.nan)) for k in ks]
        size = f"{result.mean.questions} × {len(result.best_of)}"
        name = result.label + ("" if result.complete else INCOMPLETE)
        rows.append([name, percent(result.mean), number(result.rule.value), *passes, size, result.scoring])
    return table(head, rows)


def _averages(report: Report) -> list[str]:
    known = list(dict.fromkeys(limit for figures in report.averages.values() for limit in figures))
    if not known:
        return []
    head = [report.asked, *("" if limit == "None" else f"at {limit}" for limit in known)]
    rows = [
        [name, *(marked(percent(mean), mean) if (mean := of.get(limit)) else "–" for limit in known)]
        for name, of in report.averages.items()
    ]
    return ["", *table(head, rows)]


def _details(report: Report) -> list[str]:
    lines: list[str] = []
    for result in report.results:
        lines += ["", f"## {literal(result.label)} ({literal(report.asked)})", ""]
        counts = ", ".join(f"{count} {name}" for name, count in result.counts.items() if count)
        lines.append(f"{counts}.")
        if not result.complete:
            low, high = result.bounds
            lines.append(
                f"Incomplete: {number(low)} if all that is missing were wrong, {number(high)} if right."
            )
        lines += [f"* {count} × {literal(problem)}" for problem, count in result.problems.items()]
        if result.metrics:
            lines.append(
                "Also: "
                + ", ".join(f"{name} {number(value)}" for name, value in result.metrics.items())
                + "."
            )
        passes = [
            [name, *(number(v) for v in values.values())]
            for name, values in (
                ("pass@k, unbiased", result.best_of),
                ("pass@k, with replacement (release)", result.best_of_bootstrap),
            )
        ]
        if len(result.best_of) > 1:
            lines += ["", *table(["", *(f"k={k}" for k in result.best_of)], passes)]
        for name, groups in result.subsets.items():
            if len(groups) > 1:
                rows = [[value, percent(group), str(group.questions)] for value, group in groups.items()]
                rows.append(["unweighted mean", percent(result.macro[name]), ""])
                lines += ["", *table([name, "score [95 %]", "questions"], rows)]
    return lines


def _figures(values: Mapping[str, Any], complete: bool) -> dict[str, Figure]:
    return {name: _from_json(value, complete) for name, value in values.items()}


def _from_json(value: Mapping[str, Any], complete: bool) -> Figure:
    """A figure; `complete` holds where it does not say."""
    numbers = {name: _number_or_nan(value[name]) for name in ("value", "low", "high")}
    return Figure(**numbers, questions=value["questions"], complete=value.get("complete", complete))


def _number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value
