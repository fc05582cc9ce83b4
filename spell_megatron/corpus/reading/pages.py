"""The text of HTML pages, which are strangers': what surrounds it is left out, and no page becomes a huge text."""

from __future__ import annotations

import os
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from io import BufferedReader
from typing import TYPE_CHECKING

from spell_megatron.base.terminal import said
from spell_megatron.config import SourceConfig
from spell_megatron.corpus.reading.text import Skipped, Text

if TYPE_CHECKING:
    from lxml.html import HtmlElement

HTML_BYTES = 32 << 20
"""A longer page is skipped."""
TABLE_CHARACTERS = 16 << 20
"""Of a page's tables, as they are laid out."""
_FURNITURE = (
    "//script|//style|//noscript|//template|//nav|//header|//footer|//aside|//svg|//*[@hidden]"
    "|//*[@role='navigation' or @role='banner' or @role='contentinfo' or @role='search']"
)
"""What surrounds a page's text."""
_BODY = "//main|//*[@role='main']|//article"
_BREAKS = frozenset(
    (
        *("br", "hr", "p", "pre", "div", "section", "blockquote", "table", "tr"),
        *("h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd"),
    )
)
_INDENTED, _DEEPEST = ("ul", "ol", "dl", "dd", "blockquote"), 12


def html_page(file: BufferedReader, name: str, source: SourceConfig, skipped: Skipped) -> Iterator[Text]:
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
                _empty(furniture)
        _drop_forms(page)
        bodies = [part for part in page.xpath(_BODY) if part.text_content().strip()]
        body = bodies[0] if len(bodies) == 1 else page
        _narrow(body)
        text = Inscriptis(body, ParserConfig()).get_text()
    except Exception as error:  # the page is a stranger's, and two libraries read it
        return skipped.add("not HTML", name, said(error))
    if not text.strip():
        return skipped.add("empty", name)
    yield from Text(name, textwrap.dedent(text), os.path.dirname(name), title).parts()


def _drop_forms(page: HtmlElement) -> None:
    """A form is furniture, unless it is most of the page: some servers wrap every page in one."""
    whole = _letters(page)
    for form in page.xpath("//form"):
        if form.getparent() is not None and 2 * _letters(form) < whole:
            _empty(form)


def _empty(part: HtmlElement) -> None:
    """Take away what a part holds. Without the part, what comes after it would be copied once for each."""
    after = part.tail
    part.clear()
    part.tag, part.tail = "span", after


def _letters(part: HtmlElement) -> int:
    """Characters of a part's text, without the blanks that its markup stands apart by."""
    return sum(map(len, part.text_content().split()))


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
