"""Where the reasoning of a text ends."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def strip_thinking(text: str) -> str | None:
    """The text after the last `</think>`; None where a `<think>` was opened and never closed."""
    answer = text.rpartition(CLOSE)[2]
    return None if OPEN in answer else answer


def is_outside(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` stands behind all reasoning, whatever tags it names itself."""
    behind = text[end:]
    return strip_thinking(text[:start]) is not None and OPEN not in behind and CLOSE not in behind
