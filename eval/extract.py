"""Finding the answer in a final text, as the protocol's own scorers do.

A figure is comparable with a published one only if an answer is found exactly where the official scorer
finds it. So these patterns stay apart from the reader of self-play (`spell_megatron.selfplay.grading`), which
the strict mode uses; docs/evaluation.md shows where the two differ. All are linear: the text is hostile.
"""

from __future__ import annotations

import re

from spell_megatron.selfplay.reading.statements import last_box

PLACEHOLDER = "insert answer here"
TAIL = 32_768
"""Characters from the end in which an answer is looked for."""

_TRIGGERS = ("the answer is", "correct answer is", "answer is")
_NUMBER = r"[=≈`%$°£€¥]{0,4}-?[0-9][0-9.,]*"
_IN_BRACKETS = re.compile(rf"the (?:correct )?answer is \(({_NUMBER})\)", re.IGNORECASE)
_BARE = re.compile(rf"the (?:correct )?answer is ({_NUMBER})", re.IGNORECASE)
_LETTER_PATTERNS = (
    re.compile(r"\\boxed\{([A-Z])\}"),
    re.compile(r"correct answer is \(([A-D])\)", re.IGNORECASE),
    re.compile(r"correct answer is ([A-D])", re.IGNORECASE),
    re.compile(r"answer is \(([A-D])\)", re.IGNORECASE),
    re.compile(r"answer is ([A-D])", re.IGNORECASE),
)


def phrase(text: str) -> str | None:
    """The line after the last "the answer is", else after "correct answer is", else after "answer is".

    None without any of them, or where the line echoes the placeholder.
    """
    text = text.replace("*", "")[-TAIL:]
    trigger = next((trigger for trigger in _TRIGGERS if trigger in text), None)
    if trigger is None:
        return None
    answer = text.rpartition(trigger)[2].strip().partition("\n")[0].strip().strip(".").strip()
    return answer if answer and PLACEHOLDER not in answer else None


def number(text: str) -> str | None:
    """The contents of the last box, else the number right after the last "the answer is"."""
    text = text.replace("*", "")[-TAIL:]
    if box := last_box(text):
        return box.replace(",", "").strip()
    for pattern in (_IN_BRACKETS, _BARE):
        if found := pattern.findall(text):
            return str(found[-1]).replace(",", "").rstrip(".")
    return None


def letter(text: str) -> str | None:
    """The last capital letter A-D in a box or after "answer is", where a word may go on behind it."""
    text = text.replace("*", "")[-TAIL:]
    for pattern in _LETTER_PATTERNS:
        if matches := list(pattern.finditer(text)):
            return matches[-1][1] if matches[-1][1] in "ABCD" else None
    return None
