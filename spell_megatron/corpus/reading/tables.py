"""Rows of the file types that hold them, a few at a time: JSON lines, JSON, CSV, Parquet, Arrow."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from itertools import count, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from spell_megatron.base.files import has_halves
from spell_megatron.base.terminal import said
from spell_megatron.config import SourceConfig
from spell_megatron.corpus.reading.opened import encoding
from spell_megatron.corpus.reading.rows import Row, missing_column, text_column, wanted_columns
from spell_megatron.corpus.reading.text import PART, Skipped

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

ROW_BYTES = 64 << 20
"""A longer row is skipped."""
_AT_ONCE = 16 << 20
"""Bytes of rows that are unpacked together, about."""
_BOM = b"\xef\xbb\xbf"
_MARGIN = b" \t\r\n\v\f" + _BOM

_CELL_BYTES = 16 << 20
"""Bytes of the longest cell of CSV: its parser takes four for each."""

_LINE_ENDS = ("\n", "\r")


def json_lines(file: BufferedReader, name: str, skipped: Skipped) -> Iterator[Row]:
    """One object a line; a file that begins with a bracket holds arrays, whatever it is called."""
    if _head(file)[:1] == b"[":
        yield from _items(file, name, skipped)
        return
    number = 0
    while line := file.readline(ROW_BYTES):
        number += 1
        where = f"{name} line {number}"
        if len(line) == ROW_BYTES and not line.endswith(b"\n"):
            skipped.add(f"longer than {ROW_BYTES >> 20} MiB", where)
            while (line := file.readline(ROW_BYTES)) and not line.endswith(b"\n"):
                pass
        elif line.strip():
            yield from _row(line, where, skipped)
    if number == 0:
        skipped.add("empty", name)


def json_file(file: BufferedReader, name: str, skipped: Skipped) -> Iterator[Row]:
    """A `.json` file: an array, an object spread over lines, several of them, or JSON lines."""
    line, end, _ = _head(file).partition(b"\n")
    try:
        spread = bool(end) and line[:1] == b"{" and not _decoded(line)
    except (ValueError, RecursionError):
        spread = True
    yield from _items(file, name, skipped) if spread else json_lines(file, name, skipped)


def csv_rows(file: BufferedReader, name: str, skipped: Skipped) -> Iterator[Row]:
    """A header, and rows that are told apart by whichever of `, ; tab |` the header has most of."""
    coded = encoding(file.peek(1))
    # What cannot be decoded becomes half characters, and is the fault of its row.
    errors = "surrogatepass" if coded == "utf-16" else "surrogateescape"
    lines = _Lines(io.TextIOWrapper(file, coded, errors, newline=""), name, skipped)
    header = ""
    while not header.strip() and (header := next(lines, "")):
        lines.held = 0
    marks = {mark: header.count(mark) for mark in ",;\t|"}
    mark = max(marks, key=lambda m: marks[m])
    try:
        columns = next(csv.reader([header], delimiter=mark), [])
        if not columns:
            return skipped.add("empty", name)
        for row in csv.reader(lines, delimiter=mark):
            where, lines.held = f"{name} line {lines.begin}", 0
            if len(row) > len(columns):
                skipped.add("with more fields than the header", where)
            elif any(map(has_halves, row)):
                skipped.add("not UTF-8", where)
            elif row:
                yield dict(zip_longest(columns, row, fillvalue=""))
    except csv.Error as error:
        skipped.add("damaged", name, f"{error}; what follows is not read")


def parquet_rows(path: Path, name: str, source: SourceConfig, skipped: Skipped) -> Iterator[Row]:
    """Only the columns that are needed, a row at a time: what a value takes that many rows share, and that is written
    once, nothing in the file says."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            if columns := _columns(file.schema_arrow, name, source, skipped):
                batches = file.iter_batches(batch_size=1, columns=columns, use_threads=False)
                unpack = partial(_rows, name=name, skipped=skipped)
                for unpacked in map(unpack, batches, count()):  # no batch stays while its row is used
                    yield from unpacked
    except ArrowException as error:
        skipped.add("damaged", name, said(error))


def arrow_rows(path: Path, name: str, source: SourceConfig, skipped: Skipped) -> Iterator[Row]:
    """An Arrow stream, as `datasets` saves them to disk, or an Arrow file."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                batches = pyarrow.ipc.open_stream(mapped)
                size = None
            except pyarrow.ArrowInvalid:
                batches = pyarrow.ipc.open_file(mapped)
                size = batches.num_record_batches
            if columns := _columns(batches.schema, name, source, skipped):
                before = 0
                for batch in batches if size is None else map(batches.get_batch, range(size)):
                    yield from _unpacked(batch.select(columns), before, name, skipped)
                    before += batch.num_rows
    except pyarrow.ArrowException as error:
        skipped.add("damaged", name, said(error))


def _columns(schema: Schema, name: str, source: SourceConfig, skipped: Skipped) -> list[str]:
    """The columns to read; none, with the reason noted, where there is no text among them."""
    if text_column(schema.names, source) is None:
        missing_column(schema.names, name, source, skipped)
        return []
    return wanted_columns(schema.names, source)


def _unpacked(batch: RecordBatch, before: int, name: str, skipped: Skipped) -> Iterator[Row]:
    """Rows of a batch, a slice at a time; one row where their values may be shared."""
    from pyarrow import types

    shared = any(types.is_dictionary(field.type) or types.is_nested(field.type) for field in batch.schema)
    rows = 1 if shared else max(1, _AT_ONCE // (batch.nbytes // max(batch.num_rows, 1) + 1))
    for start in range(0, batch.num_rows, rows):
        yield from _rows(batch.slice(start, rows), before + start, name, skipped)


def _rows(batch: RecordBatch, before: int, name: str, skipped: Skipped) -> list[Row]:
    """Rows of a batch, behind so many others, as Python has them. One that it cannot hold is skipped alone: a text
    that is not UTF-8, a time of a year that Python has not or of nanoseconds."""
    try:
        return cast("list[Row]", batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            each = range(batch.num_rows)
            return [row for at in each for row in _rows(batch.slice(at, 1), before + at, name, skipped)]
        skipped.add("with a value that cannot be read", f"{name} row {before + 1}", said(error))
        return []


def _decoded(line: bytes) -> Any:
    """A line's value. A long one goes through a decoder that makes no copy of it."""
    if len(line) <= PART:
        return json.loads(line.decode("utf-8-sig"))
    return msgspec.json.decode(line.removeprefix(_BOM))


def _row(raw: bytes, where: str, skipped: Skipped) -> Iterator[Row]:
    """The object that some bytes are; nothing, with the reason noted, where they are none."""
    try:
        value = _decoded(raw)
    except UnicodeDecodeError as error:
        skipped.add("not UTF-8", where, f"byte 0x{error.object[error.start]:02x}")
    except (ValueError, RecursionError) as error:
        skipped.add("not JSON", where, said(error))
    else:
        if isinstance(value, dict):
            yield value
        else:
            skipped.add("not a JSON object", where, f"found {type(value).__name__}")


def _items(file: BufferedReader, name: str, skipped: Skipped) -> Iterator[Row]:
    """The objects of arrays, and those that follow each other. One that cannot be read is skipped alone."""
    try:
        for number, item in enumerate(_split(file), start=1):
            yield from _row(item, f"{name} value {number}", skipped)
    except _TooLong:
        skipped.add(f"longer than {ROW_BYTES >> 20} MiB", name, "a value; what follows it is not read")
    except EOFError:
        skipped.add("not JSON", name, "it ends within a value")


def _split(file: BufferedReader) -> Iterator[bytes]:
    """The bytes of each value, in an array or outside of any, told apart by brackets and commas outside of strings.
    What stands in a value is not looked at: neither its depth nor its numbers end the file. Raises _TooLong, or
    EOFError within a value."""
    held, at, begin = b"", 0, 0
    depth = home = 0  # brackets that are open; 1 of them where values stand in an array
    while block := file.read(max(1 << 20, len(held))):
        held = held[begin:] + block
        at, begin = at - begin, 0
        for token in _STRUCTURE.finditer(held, at):
            mark = token[0]
            if mark == b'"':  # its end is still to come
                break
            at, end = token.end(), token.start()
            opens_array = mark == b"[" and depth == 0
            depth = max(depth + (mark in b"[{") - (mark in b"]}"), 0)
            if opens_array:
                home = 1
            elif mark in b"]}" and depth == 0:
                home, end = 0, end if home else at
            elif mark != b"," or depth != home:
                continue
            if item := held[begin:end].strip(_MARGIN):
                yield item
            begin = at
        if len(held) - begin > ROW_BYTES:
            raise _TooLong
    if rest := held[begin:].strip(_MARGIN):
        if depth:
            raise EOFError
        yield rest


_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},"]', re.DOTALL)
"""A string, a bracket, a comma, or a quotation mark whose string goes on behind what is at hand."""


class _TooLong(Exception):
    pass


class _Lines:
    """Lines of a table, for `csv.reader`, which keeps a row in memory until it ends. One of more than ROW_BYTES
    characters is skipped, but within a row, whose end could not be told then: csv.Error.

    `held` counts the characters of the row that is being read, which begins with line `begin`; 0 begins another.
    """

    def __init__(self, text: io.TextIOWrapper, name: str, skipped: Skipped) -> None:
        self._text, self._name, self._skipped = text, name, skipped
        self._number = self.begin = self.held = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        while line := self._text.readline(ROW_BYTES):
            self._number += 1
            self.begin = self.begin if self.held else self._number
            before, self.held = self.held, self.held + len(line)
            ends = len(line) < ROW_BYTES or line.endswith(_LINE_ENDS)
            if ends and self.held <= ROW_BYTES:
                csv.field_size_limit(_CELL_BYTES)  # of the process, where others may have set theirs
                return line
            if before:
                raise csv.Error(f"a row of more than {ROW_BYTES >> 20} MiB")
            self._skipped.add(f"longer than {ROW_BYTES >> 20} MiB", f"{self._name} line {self._number}")
            while line and not line.endswith(_LINE_ENDS):
                line = self._text.readline(ROW_BYTES)
            self.held = 0
        if self.held:
            raise csv.Error(f"a quotation mark in line {self.begin} is never closed")
        raise StopIteration


def _head(file: BufferedReader) -> bytes:
    """What the file begins with, from the first character that says something; nothing is read by that."""
    return file.peek(1).removeprefix(_BOM).lstrip()
