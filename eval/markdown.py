"""How figures look in tables and in JSON. Scores are shown times 100."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.statistics import Figure
from spell_megatron.base.terminal import line


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[line(str(cell)).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]


def percent(value: Figure) -> str:
    if not value.questions:
        return "–"
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without nan, which JSON does not have."""
    return {str(key): _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
