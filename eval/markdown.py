"""How figures and words look in tables and in JSON. Scores are shown times 100."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval.statistics import Figure
from spell_megatron.base.terminal import line

_MARKUP = re.compile(
    r"(?P<interval>\[[-+\d., %]+\](?![(\[:]))|[\\`*\[\]<>!|&]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=www)\."
)


def literal(text: str) -> str:
    """Text in one line of Markdown that stays text: endpoints, judges and data sets are not trusted with links, images
    and HTML. Intervals and names_like_this stay as they are."""
    return _MARKUP.sub(lambda match: match[0] if match["interval"] else f"\\{match[0]}", line(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[literal(str(cell)) for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]


INCOMPLETE = " (incomplete)"


def percent(value: Figure) -> str:
    if not value.questions:
        return "–"
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def marked(shown: str, value: Figure) -> str:
    """How a figure is shown, with a word where it is incomplete."""
    return shown if value.complete else shown + INCOMPLETE


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
