"""Prompts that fit: documents are cut until the rendered prompt is no longer than the limit.

The longest documents give way first, all to one common length, so that a short document never pays
for a long one. Text is cut at its end, in characters, and measured in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from spell_megatron.selfplay.ports import Codec
from spell_megatron.types import Document

PROMPT_TOO_LONG = "dropped:prompt_too_long"
"""The outcome of an episode in which a prompt does not fit, however much is cut."""
_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Fitted:
    """Token ids of a prompt, and how many document tokens were cut off to make it fit."""

    tokens: list[int]
    cut: int = 0


def fit(
    render: Callable[[Sequence[Document]], str], documents: Sequence[Document], codec: Codec, limit: int
) -> Fitted | None:
    """The prompt over as much of the documents as `limit` tokens hold; None where not even one token fits."""
    tokens = codec.prompt(render(documents))
    if len(tokens) <= limit:
        return Fitted(tokens)
    lengths = [codec.count(document.text) for document in documents]
    budget = sum(lengths)
    for _ in range(_ATTEMPTS):
        budget -= max(len(tokens) - limit, budget // 64)
        level = water_level(lengths, budget)
        if level < 1:
            break
        shorter = [_shortened(*pair, level) for pair in zip(documents, lengths, strict=True)]
        tokens = codec.prompt(render(shorter))
        if len(tokens) <= limit:
            return Fitted(tokens, sum(lengths) - sum(codec.count(document.text) for document in shorter))
    return None


def water_level(lengths: Sequence[int], budget: int) -> int:
    """The largest common bound under which lengths, each cut to it, sum to at most `budget`."""
    left, rest = budget, sorted(lengths)
    for index, length in enumerate(rest):
        share = left // (len(rest) - index)
        if length > share:
            return max(share, 0)
        left -= length
    return max(rest, default=0)


def _shortened(document: Document, length: int, level: int) -> Document:
    if length <= level:
        return document
    return replace(document, text=document.text[: len(document.text) * level // length])
