"""Several checkpoints side by side, paired by question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.markdown import marked, percent, plain, table
from eval.report import Report
from eval.results import Result
from eval.statistics import Difference, Figure, paired
from spell_megatron.types import SpellError


@dataclass
class Comparison:
    """Every later model against the first one, on the questions that both answered. `asked` says how."""

    protocol: str
    asked: str
    models: list[str]
    rows: list[tuple[str, list[Figure], list[Difference]]]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "benchmark": label,
                "means": [asdict(f) for f in means],
                "differences": [asdict(d) for d in differences],
            }
            for label, means, differences in self.rows
        ]
        return plain({"protocol": self.protocol, "asked": self.asked, "models": self.models, "rows": rows})

    def write(self, folder: Path) -> None:
        """`comparison.json` and `comparison.md` below `folder`."""
        (folder / "comparison.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "comparison.json").write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    def markdown(self) -> str:
        later = self.models[1:]
        head = [self.asked, *self.models, *(f"{name} − {self.models[0]}" for name in later)]
        body = [
            [label, *(marked(percent(mean), mean) for mean in means), *map(_gain, differences)]
            for label, means, differences in self.rows
        ]
        note = "Differences are paired by question: mean [95 % interval], questions that got better/worse."
        return "\n".join([*table(head, body), "", note]) + "\n"


def compare(reports: Sequence[Report]) -> Comparison:
    """Pair reports by benchmark, limit and question. A row holds what all of them measured.

    Raises SpellError where they were measured by different protocols.
    """
    first, *others = reports
    if len(protocols := {report.protocol for report in reports}) > 1:
        raise SpellError(f"reports of different protocols do not compare: {', '.join(sorted(protocols))}")
    rows = []
    for result in first.results:
        matches = [
            next(
                (r for r in o.results if (r.benchmark, r.max_input) == (result.benchmark, result.max_input)),
                None,
            )
            for o in others
        ]
        found = [match for match in matches if match is not None]
        if len(found) < len(others):
            continue
        differences = [_difference(result, match) for match in found]
        rows.append((result.label, [result.mean, *(match.mean for match in found)], differences))
    asked = "; ".join(dict.fromkeys(report.asked for report in reports))
    return Comparison(first.protocol, asked, [report.model for report in reports], rows)


def _difference(first: Result, second: Result) -> Difference:
    """Over the questions that both answered, weighed as in the headline."""
    common = [item for item in first.questions if item in second.questions]
    before, after = ([result.questions[item] for item in common] for result in (first, second))
    strata = [first.strata.get(item, "") for item in common]
    return paired(before, after, strata, first.complete and second.complete)


def _gain(value: Difference) -> str:
    mean = value.difference
    if not mean.questions:
        return "–"
    interval = f"[{100 * mean.low:+.1f}, {100 * mean.high:+.1f}]"
    return marked(f"{100 * mean.value:+.1f} {interval}, {value.better}/{value.worse}", mean)
