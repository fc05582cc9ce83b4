"""Where the reasoning of a text begins and ends."""

from __future__ import annotations

from collections.abc import Callable

from spell_megatron.types import Tokens

OPEN, CLOSE = "<think>", "</think>"
_LAST = 12
"""Tokens of a prompt's end in which a tag stands, however it is cut into tokens."""


def opens_thought(prompt: Tokens, decode: Callable[[Tokens], str]) -> bool:
    """Whether a prompt ends with an opened thought, which what is written then goes on with."""
    return decode(prompt[-_LAST:]).rstrip().endswith(OPEN)


def strip_thinking(text: str) -> str | None:
    """The text after the last `</think>`; None where a `<think>` was opened and never closed."""
    answer = text.rpartition(CLOSE)[2]
    return None if OPEN in answer else answer


def is_outside(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` stands behind all reasoning, whatever tags it names itself."""
    behind = text[end:]
    return strip_thinking(text[:start]) is not None and OPEN not in behind and CLOSE not in behind
