"""Our figures beside the paper's rows of the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval.averages import average, limits
from eval.markdown import literal, marked, number, percent, plain, table
from eval.paper import SOURCE, Row, Table, rows, tables
from eval.report import Report
from eval.statistics import Figure
from spell_megatron.base.terminal import tidy
from spell_megatron.types import SpellError


@dataclass(frozen=True, slots=True)
class PaperTable:
    """One table at one input limit: the paper's rows, in percent, and our figure for each column and their average."""

    table: Table
    max_input: int | None
    paper: Sequence[tuple[str, Row]]
    ours: Sequence[Figure | None]

    @property
    def gains(self) -> list[float | None]:
        """Ours less the paper's SPELL, in points; None where one of both is missing."""
        theirs = dict(self.paper)["SPELL"]
        pairs = zip(self.ours, theirs, strict=True)
        return [None if a is None or b is None else 100 * a.value - b for a, b in pairs]


@dataclass(frozen=True, slots=True)
class Beside:
    """A report and the paper's rows of its model; `asked` and `scoring` say how ours came about."""

    name: str
    model: str
    asked: str
    scoring: Sequence[str]
    parts: Sequence[PaperTable]

    def to_json(self) -> dict[str, Any]:
        parts = [
            {
                "table": part.table.name,
                "max_input": part.max_input,
                "columns": [*part.table.columns, "average"],
                "paper": dict(part.paper),
                "ours": [asdict(mean) if mean else None for mean in part.ours],
                "ours_less_spell": part.gains,
            }
            for part in self.parts
        ]
        return plain(
            {
                "source": SOURCE,
                "model": self.model,
                "ours": self.name,
                "asked": self.asked,
                "tables": parts,
            }
        )

    def markdown(self) -> str:
        lines = [f"# {literal(self.name)} beside {self.model} in the paper ({SOURCE}), {self.asked}"]
        for part in self.parts:
            at = f" at {part.max_input} tokens of input" if part.max_input else ""
            head = [f"{part.table.name}{at}", *part.table.columns, part.table.average]
            theirs = [[f"{training}, paper", *map(_points, row)] for training, row in part.paper]
            ours = ["–" if mean is None else marked(percent(mean), mean) for mean in part.ours]
            gains = [
                "–" if mean is None or gain is None else marked(f"{gain:+.1f}", mean)
                for mean, gain in zip(part.ours, part.gains, strict=True)
            ]
            lines += ["", *table(head, [*theirs, [self.name, *ours], ["ours − SPELL", *gains]])]
        lines += [
            "",
            f"Ours scored by: {literal('; '.join(self.scoring))}. The paper's: max(rule, judge gpt-oss-120b).",
        ]
        return tidy("\n".join(lines)) + "\n"


def beside(report: Report, model: str) -> Beside:
    """Set a report beside the paper's rows of `model`. Raises SpellError where they share no column, or no protocol."""
    if report.settings.get("protocol") != "paper":
        raise SpellError("the paper's figures compare with --protocol paper alone")
    parts = []
    for one in tables():
        for limit in limits(report.results):
            ours = [average(report.results, {name: of}, limit) for name, of in one.columns.items()]
            if (paper := rows(one, model, limit)) and any(ours):
                parts.append(
                    PaperTable(one, limit, paper, [*ours, average(report.results, one.columns, limit)])
                )
    if not parts:
        known = [
            f"{one.name}: {' '.join(sum(one.columns.values(), ()))}"
            for one in tables()
            if model in one.models
        ]
        raise SpellError(
            f"nothing was measured that the paper reports of {model}; it reports, at 16384 and 100000 tokens, "
            + "; ".join(known)
        )
    scoring = dict.fromkeys(f"{result.label}: {result.scoring}" for result in report.results)
    return Beside(report.model, model, report.asked, list(scoring), parts)


def _points(value: float | None) -> str:
    return "–" if value is None else number(value / 100)
