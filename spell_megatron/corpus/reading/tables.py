"""Rows of the file types that hold them, a few at a time: JSON lines, JSON, CSV, Parquet, Arrow."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from io import BufferedReader
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ijson
import msgspec
from ijson.common import ObjectBuilder

from spell_megatron.config import SourceConfig
from spell_megatron.corpus.reading.rows import Row, missing_column, text_column, wanted_columns
from spell_megatron.corpus.reading.text import PART, Skipped

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

ROW_BYTES = 64 << 20
"""A longer row is skipped."""
_AT_ONCE = 16 << 20
"""Bytes of rows that are unpacked together, about."""
_BOM = b"\xef\xbb\xbf"

_DEEPEST = 100
"""Lists and objects within each other, in a JSON value that is not read line by line."""
_CELL_BYTES = 16 << 20
"""Bytes of CSV read at once: its parser takes four for each."""

csv.field_size_limit(_CELL_BYTES)


def json_lines(file: BufferedReader, name: str, skipped: Skipped) -> Iterator[Row]:
    """One object a line; a file that begins with a bracket is one array, whatever it is called."""
    if _head(file)[:1] == b"[":
        yield from _items(file, name, skipped, in_array=True)
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
            try:
                row = _decoded(line)
            except UnicodeDecodeError as error:
                skipped.add("not UTF-8", where, f"byte 0x{error.object[error.start]:02x}")
            except (ValueError, RecursionError) as error:
                skipped.add("not JSON", where, str(error))
            else:
                yield from _objects([row], where, skipped)
    if number == 0:
        skipped.add("empty", name)


def json_file(file: BufferedReader, name: str, skipped: Skipped) -> Iterator[Row]:
    """A `.json` file: an array, an object spread over lines, several of them, or JSON lines."""
    line, end, _ = _head(file).partition(b"\n")
    try:
        spread = bool(end) and line[:1] == b"{" and not _decoded(line)
    except (ValueError, RecursionError):
        spread = True
    yield from _items(file, name, skipped, in_array=False) if spread else json_lines(file, name, skipped)


def csv_rows(file: BufferedReader, name: str, skipped: Skipped) -> Iterator[Row]:
    """A header, and rows that are told apart by whichever of `, ; tab |` the header has most of."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    header = text.readline(ROW_BYTES)
    marks = {mark: header.count(mark) for mark in ",;\t|"}
    mark = max(marks, key=lambda m: marks[m])
    columns = next(csv.reader([header], delimiter=mark), [])
    if not columns:
        return skipped.add("empty", name)
    try:
        for number, row in enumerate(csv.reader(text, delimiter=mark), start=2):
            if len(row) > len(columns):
                skipped.add("with more fields than the header", f"{name} line {number}")
            elif row:
                yield dict(zip_longest(columns, row, fillvalue=""))
    except csv.Error as error:
        skipped.add("damaged", name, str(error))


def parquet_rows(path: Path, name: str, source: SourceConfig, skipped: Skipped) -> Iterator[Row]:
    """Only the columns that are needed, so many rows at a time as their average size allows.

    A value that rows of a batch share is written once, and stays so (`read_dictionary`) until a row is used. Lists
    cannot stay so: their rows come one at a time.
    """
    from pyarrow import ArrowException, parquet, types

    frugal = {"buffer_size": 1 << 20, "pre_buffer": False}
    try:
        with parquet.ParquetFile(path, **frugal) as file:
            columns = _columns(file.schema_arrow, name, source, skipped)
            nested = any(types.is_nested(file.schema_arrow.field(column).type) for column in columns)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)] if columns else []
        averages = [group.total_byte_size // max(group.num_rows, 1) + 1 for group in groups]
        rows = [1 if nested else max(1, min(1024, _AT_ONCE // average)) for average in averages]
        shared = columns if max(rows, default=1) > 1 else []
        with parquet.ParquetFile(path, read_dictionary=shared, **frugal) as file:
            for number, size in enumerate(rows):
                batches = file.iter_batches(batch_size=size, row_groups=[number], columns=columns)
                for unpacked in map(_unpacked, batches):  # no batch stays while its rows are used
                    yield from unpacked
    except ArrowException as error:
        skipped.add("damaged", name, str(error).splitlines()[0])


def arrow_rows(path: Path, name: str, source: SourceConfig, skipped: Skipped) -> Iterator[Row]:
    """An Arrow stream, as `datasets` saves them to disk, or an Arrow file."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                batches = pyarrow.ipc.open_stream(mapped)
                count = None
            except pyarrow.ArrowInvalid:
                batches = pyarrow.ipc.open_file(mapped)
                count = batches.num_record_batches
            if columns := _columns(batches.schema, name, source, skipped):
                for batch in batches if count is None else map(batches.get_batch, range(count)):
                    yield from _unpacked(batch.select(columns))
    except pyarrow.ArrowException as error:
        skipped.add("damaged", name, str(error).splitlines()[0])


def _columns(schema: Schema, name: str, source: SourceConfig, skipped: Skipped) -> list[str]:
    """The columns to read; none, with the reason noted, where there is no text among them."""
    if text_column(schema.names, source) is None:
        missing_column(schema.names, name, source, skipped)
        return []
    return wanted_columns(schema.names, source)


def _unpacked(batch: RecordBatch) -> Iterator[Row]:
    """Rows of a batch as Python has them, a slice at a time; one row where their values may be shared."""
    from pyarrow import types

    shared = any(types.is_dictionary(field.type) or types.is_nested(field.type) for field in batch.schema)
    rows = 1 if shared else max(1, _AT_ONCE // (batch.nbytes // max(batch.num_rows, 1) + 1))
    for start in range(0, batch.num_rows, rows):
        yield from batch.slice(start, rows).to_pylist()


def _decoded(line: bytes) -> Any:
    """A line's value. A long one goes through a decoder that makes no copy of it."""
    if len(line) <= PART:
        return json.loads(line.decode("utf-8-sig"))
    return msgspec.json.decode(line.removeprefix(_BOM))


def _objects(values: Iterable[Any], where: str, skipped: Skipped) -> Iterator[Row]:
    for value in values:
        if isinstance(value, dict):
            yield value
        else:
            skipped.add("not a JSON object", where, f"found {type(value).__name__}")


def _items(file: BufferedReader, name: str, skipped: Skipped, *, in_array: bool) -> Iterator[Row]:
    """Values of one array, or those that follow each other, one at a time."""
    bounded = _PerItem(file)
    try:
        for value in _values(bounded, outside=int(in_array)):
            bounded.begin()
            yield from _objects([value], name, skipped)
    except _TooLong:
        skipped.add(f"longer than {ROW_BYTES >> 20} MiB", name, "a value; what follows it is not read")
    except (ijson.JSONError, _TooDeep) as error:
        reason = (str(error).splitlines() or ["nested too deeply"])[0]
        skipped.add("not JSON", name, f"{reason}; what follows it is not read")


def _values(file: _PerItem, outside: int) -> Iterator[Any]:
    """The values that stand below so many brackets. ijson's own `items` names the whole way to every bracket, which
    takes the square of their depth."""
    depth, value = 0, ObjectBuilder()
    for event, said in ijson.basic_parse(file, multiple_values=not outside):
        opens = event in ("start_map", "start_array")
        depth += opens - (event in ("end_map", "end_array"))
        if depth > _DEEPEST:
            raise _TooDeep
        if depth + (not opens) > outside:
            value.event(event, said)
            if depth == outside:
                yield value.value
                value = ObjectBuilder()


class _TooLong(Exception):
    pass


class _TooDeep(Exception):
    pass


class _PerItem:
    """A file for ijson, which ends with an error where one value goes on and on."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self._left = file, ROW_BYTES
        if file.peek(len(_BOM)).startswith(_BOM):
            file.read(len(_BOM))

    def begin(self) -> None:
        """A value has ended."""
        self._left = ROW_BYTES

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._left -= len(block)
        if self._left < 0:
            raise _TooLong
        return block


def _head(file: BufferedReader) -> bytes:
    """What the file begins with, from the first character that says something; nothing is read by that."""
    return file.peek(1).removeprefix(_BOM).lstrip()
