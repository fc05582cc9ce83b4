"""Evidence reward: a response names the documents that it rests on, and earns by how well they are the right ones.

LongRLVR (arXiv 2603.02146) adds such a reward of the context to that of the answer. Here its labels cost nothing: the
documents that the questioner read are the evidence, all others of the cluster are distractors. Only advantages see it:
which questions are kept, remembered and rewarded depends on answers alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from spell_megatron.selfplay.reading.thoughts import strip_thinking
from spell_megatron.types import Document

REQUEST = "\n\nAfter that, add one line with the numbers of the documents that the answer rests on: Evidence: [1, 4]"
_EVIDENCE = re.compile(r"Evidence:\**\s{0,4}\[([\d,\s]{0,400})\]", re.IGNORECASE)


def numbered(documents: Sequence[Document]) -> list[Document]:
    """The documents, each with its number in front, from 1."""
    return [
        replace(one, text=f"[Document {number}]\n{one.text}") for number, one in enumerate(documents, start=1)
    ]


def named(text: str) -> set[int]:
    """Indices of the documents that a response names in its last line of evidence, behind all thoughts, from 0."""
    found = _EVIDENCE.findall(strip_thinking(text) or "")
    return {int(number) - 1 for number in re.findall(r"\d{1,6}", found[-1])} if found else set()


def evidence_score(text: str, read: Sequence[int]) -> float:
    """F1 of the documents that a response names against those that the questioner read; 0 where it names none."""
    chosen, right = named(text), set(read)
    return 2 * len(chosen & right) / (len(chosen) + len(right)) if chosen else 0.0
