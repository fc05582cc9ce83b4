"""One reader for each type of file. A file that cannot be used is skipped with a reason, and the next one begins."""

from __future__ import annotations

import codecs
import logging
import os
import re
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from spell_megatron.config import SourceConfig
from spell_megatron.corpus.reading import rows
from spell_megatron.corpus.reading.opened import BROKEN, UnfoldsTooFar, encoding, opened, split_compression
from spell_megatron.corpus.reading.pages import html_page
from spell_megatron.corpus.reading.places import Place
from spell_megatron.corpus.reading.tables import arrow_rows, csv_rows, json_file, json_lines, parquet_rows
from spell_megatron.corpus.reading.text import PART, Skipped, Text, cut

_VERSION = re.compile(r"\.\d+")
_POINTER = b"version https://git-lfs.github.com/spec/"


def read_file(place: Place, source: SourceConfig, skipped: Skipped) -> Iterator[Text]:
    """The texts of one file."""
    path, name = place.path, place.name
    if not path.is_file():
        return skipped.add("not a regular file", name)
    plain, compression = split_compression(path.name)
    suffix = Path(plain).suffix
    kind = "" if _VERSION.fullmatch(suffix) else suffix.lower()
    if kind not in _READERS and kind not in _COLUMNAR and not place.asked:
        return skipped.add("of another type", name, level=logging.INFO)
    try:
        if kind in _COLUMNAR:
            if compression:
                return skipped.add("compressed though it is so within", name, "decompress it")
            yield from rows.texts(_COLUMNAR[kind](path, name, source, skipped), name, source, skipped)
            return
        with opened(path) as file:
            if not compression and file.read(len(_POINTER)) == _POINTER:
                return skipped.add("a pointer to a file that was not fetched", name, "git lfs pull")
        with opened(path) as file:
            yield from _READERS.get(kind, _prose)(file, name, source, skipped)
    except UnicodeDecodeError as error:
        skipped.add("not UTF-8", name, f"byte 0x{error.object[error.start]:02x}")
    except UnfoldsTooFar:
        skipped.add("unfolding beyond measure", name, "what comes after the measure is not read")
    except BROKEN as error:
        skipped.add("damaged", name, str(error))
    except OSError as error:
        skipped.add("unreadable", name, error.strerror or str(error))


Reader = Callable[[BufferedReader, str, SourceConfig, Skipped], Iterator[Text]]


def _prose(file: BufferedReader, name: str, source: SourceConfig, skipped: Skipped) -> Iterator[Text]:
    """A text file; its folder is its cluster. A huge one comes in parts that end with a paragraph."""
    folder, title = os.path.dirname(name), os.path.basename(name)
    rest, number, decoder = "", 1, None
    while block := file.read(PART):
        if decoder is None:
            coded = encoding(block)
            decoder = codecs.getincrementaldecoder(coded)()
        if b"\0" in block and coded != "utf-16":
            return skipped.add("binary", name)
        rest += decoder.decode(block)
        while len(rest) > PART:
            at = cut(rest, 1, PART)
            yield Text(f"{name}#part{number}", rest[:at], folder, title)
            rest, number = rest[at:], number + 1
    if decoder is not None:
        rest += decoder.decode(b"", final=True)
    if number == 1 and not rest.strip():
        return skipped.add("empty", name)
    yield Text(name if number == 1 else f"{name}#part{number}", rest, folder, title)


def _table(read: Callable[[BufferedReader, str, Skipped], Iterator[rows.Row]]) -> Reader:
    def texts(file: BufferedReader, name: str, source: SourceConfig, skipped: Skipped) -> Iterator[Text]:
        return rows.texts(read(file, name, skipped), name, source, skipped)

    return texts


_PROSE = (
    "",
    ".txt",
    ".text",
    ".md",
    ".markdown",
    ".mdx",
    ".rst",
    ".adoc",
    ".asciidoc",
    ".org",
    ".pod",
    ".tex",
    ".texi",
)
_READERS: dict[str, Reader] = {
    **dict.fromkeys(_PROSE, _prose),
    **dict.fromkeys((".html", ".htm", ".xhtml"), html_page),
    **dict.fromkeys((".jsonl", ".ndjson"), _table(json_lines)),
    **dict.fromkeys((".csv", ".tsv"), _table(csv_rows)),
    ".json": _table(json_file),
}
_COLUMNAR = {".parquet": parquet_rows, ".arrow": arrow_rows, ".feather": arrow_rows}
