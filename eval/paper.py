"""The paper's own figures (`paper.yaml`), to set ours beside them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from spell_megatron.types import SpellError

SOURCE = "arXiv 2509.23863v4"
Columns = Mapping[str, tuple[str, ...]]
"""Parts of each column: a benchmark's name, or one subset of it as `mrcr/needles=2`."""
Row = tuple[float | None, ...]
"""Percent, a figure a column and their average; None where it is not recorded."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table. `models[model][limit][training]` is a row; training is `base`, `RLVR` or `SPELL`, and the limit is in
    tokens of input, None where the table has none."""

    name: str
    average: str
    columns: Columns
    models: Mapping[str, Mapping[int | None, Mapping[str, Row]]]


@cache
def tables() -> tuple[Table, ...]:
    """Tables 1, 7 and 8."""
    values = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))
    return tuple(
        Table(
            table["name"],
            table["average"],
            {name: tuple(parts) for name, parts in table["columns"].items()},
            {
                model: {
                    limit: {name: tuple(row) for name, row in rows.items()}
                    for limit, rows in by_limit.items()
                }
                for model, by_limit in table["models"].items()
            },
        )
        for table in values["tables"]
    )


def models() -> list[str]:
    """Names of the models that the paper trains, as on the hub."""
    return list(dict.fromkeys(model for table in tables() for model in table.models))


def find_model(name: str) -> str:
    """The paper's model that a name or folder means: the longest that occurs in it, whatever its separators.

    Raises SpellError where none does.
    """
    plain = _plain(name)
    found = [model for model in models() if _plain(model) in plain]
    if found:
        return max(found, key=len)
    close = difflib.get_close_matches(name, models(), n=1, cutoff=0.3)
    hint = f"; did you mean paper:{close[0]}?" if close else ""
    raise SpellError(
        f"the paper has no model that {name!r} names{hint} Say which one: --compare paper:MODEL, MODEL one of"
        f" {', '.join(models())}"
    )


def _plain(name: str) -> str:
    """A name without its case, its separators and its owner, who calls Llama now `Meta-Llama`, now `Llama`."""
    return re.sub(r"[^a-z0-9]|meta-(?=llama-)", "", name.lower())


def rows(table: Table, model: str, limit: int | None) -> Sequence[tuple[str, Row]]:
    """What the paper has of a model at a limit, in its order; empty where that is nothing."""
    return list(table.models.get(model, {}).get(limit, {}).items())
