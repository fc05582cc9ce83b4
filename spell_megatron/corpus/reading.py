"""Texts of a source, one at a time: a corpus may be far larger than memory.

A file that cannot be used is skipped with a reason and never stops the others. Layouts of rows
(JSON lines, JSON, Parquet) are told apart by their columns:

    text_field [, cluster_field] [, title]   the general layout
    content                                  Ultra-FineWeb (openbmb/Ultra-FineWeb)
    paragraphs, question_id                  DocMath-Eval (yale-nlp/DocMath-Eval): a row is one long
                                             text of its own cluster; its questions are not read
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, cast

from spell_megatron.config import Source
from spell_megatron.types import SpellError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
"""A longer text file is read in parts of this size, so that no file is ever whole in memory."""
ROW_BYTES = 64 << 20
"""A longer JSON line is skipped."""
JSON_BYTES = 1 << 30
"""A longer .json file (one array: it has to be read whole) is skipped."""
SHOWN = 3
"""Files of each kind of fault that are named in the log; the others are counted."""

_PROSE = {".txt", ".text", ".md", ".markdown", ".rst", ""}
_ROWS = {".jsonl", ".ndjson", ".json", ".parquet"}
_VERSION = re.compile(r"\.\d+")
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")


@dataclass(frozen=True, slots=True)
class Text:
    """A text as its source gives it. `cluster` is its given group: folder, id or file."""

    name: str
    text: str
    cluster: str
    title: str = ""


@dataclass
class Skipped:
    """What was left out of a corpus, and why: counted, and the first of each kind logged."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str, detail: str = "", level: int = logging.WARNING) -> None:
        self.counts[reason] += 1
        message = f"{where}: {reason}{f' ({detail})' if detail else ''}"
        self.first.setdefault(reason, message)
        if self.counts[reason] <= SHOWN:
            logger.log(level, "skipped %s", message)
        elif self.counts[reason] == SHOWN + 1:
            logger.log(level, "further files or rows that are %s are counted, not named", reason)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())


def read(source: Source, skipped: Skipped) -> Iterator[Text]:
    """Every text of a folder, a file or a hub data set, in a fixed order.

    Raises SpellError where the path does not exist or the hub cannot be reached.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        for file in _walk(path):
            yield from _read_file(file, file.relative_to(path).as_posix(), source, skipped)
    elif path.exists():
        yield from _read_file(path, path.name, source, skipped, asked=True)
    else:
        for name, fetch in _hub_files(source.path):
            yield from _read_file(fetch(), name, source, skipped)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(files))


def _read_file(
    path: Path, name: str, source: Source, skipped: Skipped, asked: bool = False
) -> Iterator[Text]:
    """`asked` files were named by the user: whatever their ending, they are taken for text."""
    zipped = path.suffix == ".gz"
    suffix = Path(path.stem).suffix if zipped else path.suffix
    kind = "" if _VERSION.fullmatch(suffix) else suffix.lower()
    if not path.is_file():
        return skipped.add("not a regular file", name)
    if kind not in _ROWS and kind not in _PROSE and not asked:
        return skipped.add("of another type", name, level=logging.INFO)
    try:
        if kind == ".parquet":
            rows: Iterable[Mapping[str, Any]] = _parquet_rows(path, name, source, skipped)
            yield from _texts(rows, name, source, skipped)
            return
        with cast(BinaryIO, gzip.open(path) if zipped else path.open("rb")) as file:
            if kind == ".json":
                yield from _texts(_json_rows(file, path.stat().st_size, name, skipped), name, source, skipped)
            elif kind in _ROWS:
                yield from _texts(_json_lines(file, name, skipped), name, source, skipped)
            else:
                yield from _prose(file, name, skipped)
    except UnicodeDecodeError as error:
        skipped.add("not UTF-8", name, f"byte 0x{error.object[error.start]:02x}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        skipped.add("damaged", name, str(error))
    except OSError as error:
        skipped.add("unreadable", name, error.strerror or str(error))


def _prose(file: BinaryIO, name: str, skipped: Skipped) -> Iterator[Text]:
    """A text file; its folder is its cluster. A huge one comes in parts that end with a paragraph."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    folder, title = os.path.dirname(name), os.path.basename(name)
    rest, part = "", 1
    while block := file.read(BLOCK_BYTES):
        if b"\0" in block:
            return skipped.add("binary", name)
        rest += decoder.decode(block)
        if len(block) == BLOCK_BYTES:
            cut = next((at for mark in ("\n\n", "\n", " ") if (at := rest.rfind(mark)) > 0), len(rest))
            yield Text(f"{name}#part{part}", rest[:cut], folder, title)
            rest, part = rest[cut:], part + 1
    rest += decoder.decode(b"", final=True)
    if part == 1 and not rest.strip():
        return skipped.add("empty", name)
    yield Text(name if part == 1 else f"{name}#part{part}", rest, folder, title)


def _json_lines(file: BinaryIO, name: str, skipped: Skipped) -> Iterator[Mapping[str, Any]]:
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
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                skipped.add("not UTF-8", where, f"byte 0x{error.object[error.start]:02x}")
            except (ValueError, RecursionError) as error:
                skipped.add("not JSON", where, str(error))
            else:
                if isinstance(row, dict):
                    yield row
                else:
                    skipped.add("not a JSON object", where, f"found {type(row).__name__}")
    if number == 0:
        skipped.add("empty", name)


def _json_rows(file: BinaryIO, size: int, name: str, skipped: Skipped) -> Iterator[Mapping[str, Any]]:
    """Rows of one JSON array; a .json file that holds JSON lines is read as such."""
    if size > JSON_BYTES:
        return skipped.add("too large for one JSON array", name, "convert it to .jsonl")
    try:
        rows = json.loads(file.read())
    except (ValueError, RecursionError):
        file.seek(0)
        yield from _json_lines(file, name, skipped)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if isinstance(row, dict):
            yield row
        else:
            skipped.add("not a JSON object", f"{name} row {number}", f"found {type(row).__name__}")


def _parquet_rows(path: Path, name: str, source: Source, skipped: Skipped) -> Iterator[Mapping[str, Any]]:
    """Only the columns that are needed, a few rows at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise SpellError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    wanted = {source.text_field, source.cluster_field, "content", "paragraphs", "question_id", "title"}
    try:
        with parquet.ParquetFile(path) as file:
            columns = [column for column in file.schema_arrow.names if column in wanted]
            if _layout(columns, source) is None:
                return _missing_column(file.schema_arrow.names, name, source, skipped)
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
    except ArrowException as error:
        skipped.add("damaged", name, str(error).splitlines()[0])


def _layout(columns: Iterable[str], source: Source) -> str | None:
    """The column that holds the text; None where there is none."""
    names = set(columns)
    default = source.text_field == Source().text_field
    known = [source.text_field, *(("content", "paragraphs") if default else ())]
    return next((column for column in known if column in names), None)


def _missing_column(columns: Iterable[str], name: str, source: Source, skipped: Skipped) -> None:
    names = sorted(columns)
    near = difflib.get_close_matches(source.text_field, names, n=1, cutoff=0.5)
    detail = f"did you mean text_field: {near[0]}? " if near else ""
    skipped.add(f"without a column {source.text_field!r}", name, f"{detail}columns: {', '.join(names[:20])}")


def _texts(rows: Iterable[Mapping[str, Any]], name: str, source: Source, skipped: Skipped) -> Iterator[Text]:
    """Rows to texts. The first row tells the file's layout."""
    column = None
    for number, row in enumerate(rows, start=1):
        where = f"{name}#{number}"
        if column is None and (column := _layout(row, source)) is None:
            return _missing_column(row, name, source, skipped)
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
            yield Text(
                where, value, name if given is None else str(given), title if isinstance(title, str) else ""
            )


def _hub_files(path: str) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Files of the hub data set `org/name` or `org/name:pattern`, each fetched when it is reached."""
    match = _HUB.fullmatch(path)
    if match is None:
        raise SpellError(
            f"the corpus {path!r} is neither a file, a folder nor a hub id (org/name or org/name:pattern)"
        )
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise SpellError(
            f"there is no file or folder {path!r}; to read it from the hub: pip install huggingface_hub"
        ) from None
    repository, pattern = match[1], match[2] or "*"

    def fetch(name: str) -> Path:
        try:
            return Path(hf_hub_download(repository, name, repo_type="dataset"))
        except (OSError, HfHubHTTPError) as error:
            raise SpellError(
                f"cannot fetch {name} of the hub data set {repository}: {_first_line(error)}"
            ) from None

    try:
        names = sorted(HfApi().list_repo_files(repository, repo_type="dataset"))
    except (
        Exception
    ) as error:  # the hub client raises several unrelated families of errors when it is offline
        raise SpellError(
            f"there is no file or folder {path!r}, and the hub data set {repository} cannot be listed:"
            f" {_first_line(error)}; download it and give its folder"
        ) from None
    chosen = [
        name for name in names if fnmatch(name, pattern) and Path(name.removesuffix(".gz")).suffix in _ROWS
    ]
    if not chosen:
        raise SpellError(
            f"the hub data set {repository} has no JSON lines or Parquet file that matches {pattern!r}"
        )
    for name in chosen:
        yield name, lambda name=name: fetch(name)  # type: ignore[misc]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
