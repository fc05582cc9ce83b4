"""Texts of others inside our prompts: they stay inside the place that they are given.

A document cannot close the `<text>` it stands in, however it spells the tag, and none forges another tag that its
prompt marks places with. What a verifier is shown (question, reference, answer) is one line each, so that none can
write the prompt's next paragraph, and no mark of a verdict, so that a vote may quote it.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from spell_megatron.selfplay.reading import FILLERS
from spell_megatron.types import Document, Question

TAGS = frozenset({"text"})
"""What every style has around documents."""
LONGEST = 40
"""Characters of a tag's name."""
_OPENER = re.compile("[<\uff1c\ufe64\u2039\u3008\u2329\u27e8\u00ab]")
_SLASHES = "/\\\u2044\u2215\u2571\u29f5\u29f8"
_UNSEEN = ("Cc", "Cf", "Mn", "Me")
"""Categories of what may stand inside a tag and is not seen there: controls, formats, variation selectors, accents."""
_NAME = re.compile(r"[\w-]*")
_MARK = re.compile(r"\[(?=\s*\[)|\](?=\s*\])")


class _Seen(dict[str, str]):
    """What is seen of a character, in small letters; filled as it is asked."""

    def __missing__(self, character: str) -> str:
        shown = unicodedata.normalize("NFKC", character).casefold()
        kept = (one for one in shown if one in string.whitespace or unicodedata.category(one) not in _UNSEEN)
        return self.setdefault(character, "".join(one for one in kept if one not in FILLERS))


_SEEN = _Seen()


def fenced(text: str, tags: Collection[str] = TAGS) -> str:
    """Text without any spelling of these tags (`<text>`, `</text>`): their angle brackets become round ones."""
    return _OPENER.sub(lambda bracket: "(" if _opens(bracket, tags) else bracket[0], text).strip()


def one_line(text: str) -> str:
    return " ".join(text.split())


def quoted(text: str, tags: Collection[str] = TAGS) -> str:
    """One line without tags or marks of a verdict (`[[`, `]]`)."""
    return _MARK.sub(lambda match: f"{match[0]} ", fenced(one_line(text), tags))


def unmarked(text: str) -> str:
    """Quoted, and without any angle bracket that some style's tags could begin with."""
    return quoted(_OPENER.sub("(", text))


def safe(variables: Mapping[str, Any], *, judged: bool, tags: Collection[str] = TAGS) -> dict[str, Any]:
    """A template's variables with every text in them made safe; `judged` are those that a verdict is asked on, `tags`
    what the template marks its places with."""
    kept = quoted if judged else fenced
    return {name: _safe(value, kept, tags) for name, value in variables.items()}


def _safe(value: Any, kept: Callable[[str, Collection[str]], str], tags: Collection[str]) -> Any:
    if isinstance(value, str):
        return kept(value, tags)
    if isinstance(value, Document):
        return replace(value, text=fenced(value.text, tags), title=fenced(one_line(value.title), tags))
    if isinstance(value, Question):
        options = {letter: quoted(choice, tags) for letter, choice in value.options.items()}
        return replace(value, text=kept(value.text, tags), answer=quoted(value.answer, tags), options=options)
    if isinstance(value, Sequence):
        return [_safe(entry, kept, tags) for entry in value]
    return value


def _opens(bracket: re.Match[str], tags: Collection[str]) -> bool:
    """Whether an angle bracket begins one of the tags, or nothing more: the next text could go on with it.

    What is passed over holds no other bracket, so that a text is read once, however many it has.
    """
    text, name = bracket.string, ""
    for at in range(bracket.end(), len(text)):
        seen = _SEEN[text[at]]
        if not name and all(one.isspace() or one in _SLASHES for one in seen):
            continue
        name += seen
        if len(name) > LONGEST or not _NAME.fullmatch(seen):
            break
    found = _NAME.match(name)
    return not name or (found is not None and found[0] in tags)
