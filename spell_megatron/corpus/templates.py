"""Sentences of a generated world as templates, which both write (`str.format`) and read (`reader`).

A question that a model wrote is understood by the same table that made the documents, and the ground truth
needs no second copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LETTERS = "ABCD"
"""Of choices."""
TASKS = ("doc_general_qa", "docmath_qa", "doc_mc")
"""What every generated world is asked."""


def reader(template: str, slots: Mapping[str, str]) -> re.Pattern[str]:
    """The pattern that reads what `template` writes.

    `slots` gives what stands in a slot of one letter, which becomes a named group.
    """
    parts = re.split(r"\{(\w)\}", template)
    pattern = "".join(
        f"(?P<{part}>{slots[part]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)
    )
    return re.compile(pattern)


def phrases(template: str) -> list[str]:
    """The fixed stretches of a template, end punctuation apart: what may deserve a token of its own."""
    stretches = re.split(r"\{\w\}", template)
    return [piece for stretch in stretches for piece in re.split(r"([.?])", stretch.strip()) if piece.strip()]
