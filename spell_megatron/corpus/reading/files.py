"""One reader for each type of file. A file that cannot be used is skipped with a reason, and the next one begins."""

from __future__ import annotations

import codecs
import logging
import os
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from spell_megatron.config import SourceConfig
from spell_megatron.corpus.reading import rows
from spell_megatron.corpus.reading.opened import BROKEN, UnfoldsTooFar, opened, split_compression
from spell_megatron.corpus.reading.places import Place
from spell_megatron.corpus.reading.tables import arrow_rows, csv_rows, json_file, json_lines, parquet_rows
from spell_megatron.corpus.reading.text import PART, Skipped, Text, cut

if TYPE_CHECKING:
    from lxml.html import HtmlElement

HTML_BYTES = 32 << 20
"""A longer page is skipped."""
TABLE_CHARACTERS = 16 << 20
"""Of a page's tables, as they are laid out."""
_BREAKS = frozenset(
    (
        *(
            "br",
            "p",
            "div",
            "li",
            "tr",
            "pre",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "hr",
            "ul",
            "ol",
            "dl",
            "dt",
            "dd",
        ),
        *("table", "blockquote", "section"),
    )
)
_INDENTED, _DEEPEST = ("ul", "ol", "dl", "dd", "blockquote"), 12
_VERSION = re.compile(r"\.\d+")
_POINTER = b"version https://git-lfs.github.com/spec/"
_FURNITURE = (
    "//script|//style|//noscript|//template|//nav|//header|//footer|//aside|//form|//svg|//*[@hidden]"
    "|//*[@role='navigation' or @role='banner' or @role='contentinfo' or @role='search']"
)
"""What surrounds a page's text."""
_BODY = "//main|//*[@role='main']|//article"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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
            wide = block.startswith(_UTF16) and not block.startswith(codecs.BOM_UTF32_LE)
            decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")()
        if b"\0" in block and not wide:
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


def _page(file: BufferedReader, name: str, source: SourceConfig, skipped: Skipped) -> Iterator[Text]:
    """The text of an HTML page as a browser would lay it out, without what surrounds it."""
    from inscriptis.html_engine import Inscriptis
    from inscriptis.model.config import ParserConfig
    from lxml.html import document_fromstring

    content = file.read(HTML_BYTES + 1)
    if len(content) > HTML_BYTES:
        return skipped.add(f"longer than {HTML_BYTES >> 20} MiB", name)
    try:
        page = document_fromstring(_decoded_page(content))
        title = page.findtext(".//title") or os.path.basename(name)
        for furniture in page.xpath(_FURNITURE):
            if furniture.getparent() is not None:
                furniture.drop_tree()
        bodies = page.xpath(_BODY)
        body = bodies[0] if len(bodies) == 1 else page
        _narrow(body)
        text = Inscriptis(body, ParserConfig()).get_text()
    except Exception as error:  # the page is a stranger's, and two libraries read it
        return skipped.add("not HTML", name, str(error) or type(error).__name__)
    if not text.strip():
        return skipped.add("empty", name)
    yield from Text(name, textwrap.dedent(text), os.path.dirname(name), title).parts()


def _narrow(page: HtmlElement) -> None:
    """Take apart what would make a small page a huge text: tables that come after the first `TABLE_CHARACTERS`, since
    every row is filled up to the longest lines of its columns, and lists within many lists, which are indented."""
    room = TABLE_CHARACTERS
    for table in list(page.iter("table")):
        if (size := _size(table)) <= room:
            room -= size
            continue
        for part in list(table.iter("table", "thead", "tbody", "tfoot", "tr", "td", "th")):
            part.tag = "div" if part.tag in ("table", "tr") else "span"
    for part in list(page.iter(*_INDENTED)):
        if sum(1 for _ in part.iterancestors(*_INDENTED)) >= _DEEPEST:
            part.tag = "div"


def _size(table: HtmlElement) -> int:
    """Characters of a table that is laid out: lines of its rows times the widths of its columns."""
    widths, lines = defaultdict[int, int](int), 0
    for row in table.iter("tr"):
        if next(row.iterancestors("table"), None) is not table:
            continue
        cells = [_extent(cell) for cell in row.iterchildren("td", "th")]
        lines += max((height for _, height in cells), default=0)
        for place, (width, _) in enumerate(cells):
            widths[place] = max(widths[place], width)
    return lines * sum(widths.values())


def _extent(cell: HtmlElement) -> tuple[int, int]:
    """Width and height of a cell in characters, about: a line ends where a block or a break begins."""
    widest, line, lines = 0, 0, 1
    for part in cell.iter():
        if part.tag in _BREAKS:
            widest, line, lines = max(widest, line), 0, lines + 1
        text = part.text if isinstance(part.tag, str) and part.text else ""
        lines += text.count("\n") if part.tag == "pre" else 0
        line += len(text) + len(part.tail or "")
    return max(widest, line), lines


def _decoded_page(content: bytes) -> str | bytes:
    """UTF-8 where it is that; else the page's own word on its encoding counts."""
    try:
        return re.sub(r"^\s*<\?xml[^>]*\?>", "", content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return content


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
    **dict.fromkeys((".html", ".htm", ".xhtml"), _page),
    **dict.fromkeys((".jsonl", ".ndjson"), _table(json_lines)),
    **dict.fromkeys((".csv", ".tsv"), _table(csv_rows)),
    ".json": _table(json_file),
}
_COLUMNAR = {".parquet": parquet_rows, ".arrow": arrow_rows, ".feather": arrow_rows}
