"""Which column of a row is a text. Layouts are told apart by their columns:

text_field [, cluster_field] [, title]   the general layout
content                                  Ultra-FineWeb (openbmb/Ultra-FineWeb)
paragraphs, question_id                  DocMath-Eval (yale-nlp/DocMath-Eval): a row is one long
                                         text of its own cluster; its questions are not read
any, with text_field "*"                 every text of a row, and every list of texts as one
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from spell_megatron.config import EVERY_TEXT, SourceConfig
from spell_megatron.corpus.reading.text import Skipped, Text

Row = Mapping[str, Any]
_STRANGERS = 1000
_GENERAL = SourceConfig().text_field
_TOGETHER = ".*"
"""Where the texts of a list stand as one."""
_QUESTION = re.compile(
    r"(?:question|problem|query|queries|prompt|input|instruction)s?"
    r"(?:[^a-z]?(?:text|statement|body|content|stem))?(?:[_-](?!id)[a-z]{2})?[\W\d_]*\Z",
    re.IGNORECASE,
)
"""How the names of columns end that hold questions: perhaps with a language, `question_en`, but no `question_id`."""


def texts(rows: Iterable[Row], name: str, source: SourceConfig, skipped: Skipped) -> Iterator[Text]:
    """Rows to texts. A file whose first `_STRANGERS` rows have none is read no further."""
    strangers = 0
    for number, row in enumerate(rows, start=1):
        where = f"{name}#{number}"
        if (column := text_column(row, source)) is None:
            missing_column(row, where, source, skipped)
            strangers += 1
            if strangers == number == _STRANGERS:
                return
            continue
        if column == EVERY_TEXT:
            asked = any(_asks(place) and any(map(str.isalpha, part)) for place, part in _every(row))
            for place, part in _every(row):
                asks = not place.endswith(_TOGETHER) and (_asks(place) or not asked)
                yield from Text(f"{where}{place}", part, name, asks=asks).parts()
            continue
        value = row.get(column)
        if column == "paragraphs" and isinstance(value, list):
            value = "\n\n".join(paragraph for paragraph in value if isinstance(paragraph, str))
        if value is None or value == "":
            skipped.add("empty", where)
        elif not isinstance(value, str):
            skipped.add(f"without text in {column!r}", where, f"found {type(value).__name__}")
        else:
            given = row.get(source.cluster_field)
            if given is None and column == "paragraphs":
                given = row.get("question_id", where)
            title = row.get("title")
            yield from Text(
                where, value, name if given is None else str(given), title if isinstance(title, str) else ""
            ).parts()


def text_column(columns: Container[str], source: SourceConfig) -> str | None:
    """The column that holds the text; None where there is none."""
    if source.text_field == EVERY_TEXT:
        return EVERY_TEXT
    known = (source.text_field, *(("content", "paragraphs") if source.text_field == _GENERAL else ()))
    return next((column for column in known if column in columns), None)


def wanted_columns(columns: Iterable[str], source: SourceConfig) -> list[str]:
    """Those of `columns` that `texts` looks at."""
    if source.text_field == EVERY_TEXT:
        return list(columns)
    wanted = {source.text_field, source.cluster_field, "content", "paragraphs", "question_id", "title"}
    return [column for column in columns if column in wanted]


def _every(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a value, with where it stands; several in one list are one text, too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _every(part, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        texts = [part for part in value if isinstance(part, str)]
        if len(texts) > 1:
            yield place + _TOGETHER, "\n\n".join(texts)
        for number, part in enumerate(value):
            yield from _every(part, f"{place}.{number}")


def _asks(place: str) -> bool:
    """Whether a text stands in a column of questions."""
    return any(map(_QUESTION.search, place.split(".")))


def missing_column(columns: Iterable[str], name: str, source: SourceConfig, skipped: Skipped) -> None:
    names = sorted(map(str, columns))
    near = difflib.get_close_matches(source.text_field, names, n=1, cutoff=0.5)
    detail = f"did you mean text_field: {near[0]}? " if near else ""
    skipped.add(f"without a column {source.text_field!r}", name, f"{detail}columns: {', '.join(names[:20])}")
