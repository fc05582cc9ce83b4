"""Texts of others inside our prompts: they stay inside the place that they are given.

A document cannot close the `<text>` it stands in, however it spells the tag. What a verifier is shown
(question, reference, answer) is one line each, so that none can write the prompt's next paragraph, and
no mark of a verdict, so that a vote may quote it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spell_megatron.types import Document, Question

_OPENER = re.compile("[<\uff1c\ufe64\u2039\u3008\u2329\u27e8\u00ab]")
_WINDOW = 40
"""Characters behind an angle bracket in which a tag's name is looked for."""
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)
_TAG = re.compile(r"[\s/\\]*(?:text(?![\w-])|\Z)")
"""The rest of a tag, or nothing more: the next text could go on with it."""
_MARK = re.compile(r"\[(?=\s*\[)|\](?=\s*\])")


def fenced(text: str) -> str:
    """Text without any spelling of the tags `<text>` and `</text>`: their angle brackets become round ones."""
    return _OPENER.sub(_rounded, text).strip()


def one_line(text: str) -> str:
    return " ".join(text.split())


def quoted(text: str) -> str:
    """One line without tags or marks of a verdict (`[[`, `]]`)."""
    return _MARK.sub(lambda match: f"{match[0]} ", fenced(one_line(text)))


def safe(variables: Mapping[str, Any], *, judged: bool) -> dict[str, Any]:
    """A template's variables with every text in them made safe; `judged` are those that a verdict is asked on."""
    kept = quoted if judged else fenced
    return {name: _safe(value, kept) for name, value in variables.items()}


def _safe(value: Any, kept: Any) -> Any:
    if isinstance(value, str):
        return kept(value)
    if isinstance(value, Document):
        return replace(value, text=fenced(value.text), title=fenced(one_line(value.title)))
    if isinstance(value, Question):
        options = {letter: quoted(choice) for letter, choice in value.options.items()}
        return replace(value, text=kept(value.text), answer=quoted(value.answer), options=options)
    if isinstance(value, Sequence):
        return [_safe(entry, kept) for entry in value]
    return value


def _rounded(match: re.Match[str]) -> str:
    behind = match.string[match.end() : match.end() + _WINDOW]
    name = _INVISIBLE.sub("", unicodedata.normalize("NFKC", behind)).casefold()
    return "(" if _TAG.match(name) else match[0]
