"""Held-out questions, for measuring only: from a generated world, or from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spell_megatron.base.files import has_halves
from spell_megatron.config import HeldOutConfig
from spell_megatron.corpus.worlds import WORLDS
from spell_megatron.types import Cluster, Document, Question, SpellError


def load_heldout(settings: HeldOutConfig) -> list[tuple[Cluster, Question]]:
    """The first `settings.questions` held-out questions with their documents; none where that is 0."""
    if settings.questions == 0:
        return []
    if settings.path in WORLDS:
        return WORLDS[settings.path].heldout(settings.questions, settings.seed)
    path = Path(settings.path).expanduser()
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            return list(_read(path, file, settings.questions))
    except (OSError, UnicodeDecodeError) as error:
        raise SpellError(f"cannot read the held-out questions {path} (heldout.path): {error}") from None


def _read(path: Path, lines: Iterator[str], count: int) -> Iterator[tuple[Cluster, Question]]:
    """The first questions. Lines are those of JSON: other breaks may stand within a text."""
    for number, line in enumerate(lines, start=1):
        if count == 0:
            return
        if line.strip():
            count -= 1
            yield _parse(path, number, line)


def _parse(path: Path, number: int, line: str) -> tuple[Cluster, Question]:
    try:
        row = json.loads(line)
        texts = [_text(text, "a document") for text in _kind(row["documents"], list, "documents")]
        documents = tuple(Document(f"{number}/{i}", text) for i, text in enumerate(texts))
        task, text, answer = (_text(row[name], name) for name in ("task", "question", "answer"))
        options, labels = (_texts(row.get(name), name) for name in ("options", "labels"))
        if not documents:
            raise ValueError("documents is empty")
        if (task == "doc_mc" or options) and answer not in options:
            raise ValueError("answer is no letter of options")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SpellError(
            f"{path} line {number} is no held-out question ({error}); it needs the fields task, question, answer,"
            " documents (a list of texts), options for doc_mc, and labels (an object of texts) where there are some"
        ) from None
    question = Question(task, text, answer, options, labels)
    return Cluster(f"{path.stem}/{number}", "heldout", documents), question


def _kind(value: Any, kind: type, what: str) -> Any:
    """Raises TypeError for anything but `kind`: a text is also a list of characters, to Python."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} is {type(value).__name__}, not {kind.__name__}")
    return value


def _text(value: Any, what: str) -> str:
    """A text that is not empty and has no half characters, which JSON can spell; or a number as one."""
    text = (
        str(value)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else _kind(value, str, what)
    )
    if not text.strip():
        raise ValueError(f"{what} is empty")
    if has_halves(text):
        raise ValueError(f"{what} has half a character: {text!r}")
    return text


def _texts(value: Any, what: str) -> dict[str, str]:
    texts = _kind(value or {}, dict, what)
    return {_text(name, f"a name in {what}"): _text(text, f"{what}.{name}") for name, text in texts.items()}
