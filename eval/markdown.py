"""How figures look in tables and in JSON. Scores are shown times 100."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eval.statistics import Figure
from spell_megatron.terminal import line


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


def plain(value: Any) -> Any:
    """Without nan, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
