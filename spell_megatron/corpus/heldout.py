"""Held-out questions, for measuring only: from a generated world, or from a file."""

from __future__ import annotations

import json
from pathlib import Path

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
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpellError(f"cannot read the held-out questions {path} (heldout.path): {error}") from None
    return [_parse(path, number, line) for number, line in enumerate(lines[: settings.questions], start=1)]


def _parse(path: Path, number: int, line: str) -> tuple[Cluster, Question]:
    try:
        row = json.loads(line)
        documents = tuple(Document(f"{number}/{i}", str(text)) for i, text in enumerate(row["documents"]))
        options = dict(row.get("options") or {})
        labels = {str(name): str(value) for name, value in dict(row.get("labels") or {}).items()}
        question = Question(row["task"], row["question"], str(row["answer"]), options, labels)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpellError(
            f"{path} line {number} is no held-out question ({error}); it needs the fields task, question, answer,"
            " documents (a list of texts), options for doc_mc, and labels (an object of texts) where there are some"
        ) from None
    return Cluster(f"{path.stem}/{number}", "heldout", documents), question
