"""Reading public data sets in their own layout, from a local folder or from the Hugging Face hub.

Machines that evaluate are often offline, so a local folder is the rule: it holds one folder per data
set, named like the hub id (`THUDM/LongBench`, or `LongBench`) or like the benchmark. JSON Lines, JSON,
TSV and Parquet files are read, and such files inside a zip archive (`data.zip!data/musique.jsonl`).

A row that cannot be used is counted with its reason; it never becomes a question with a wrong answer.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, TypeVar

from spell_megatron.base.files import has_halves
from spell_megatron.base.terminal import said
from spell_megatron.types import SpellError

Row = dict[str, Any]
T = TypeVar("T")
MANIFEST = "manifest.json"
KINDS = (".json", ".jsonl", ".parquet", ".tsv", ".csv")
ARCHIVES = (".zip",)
NOT_UTF8 = "not UTF-8"
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError)
"""What reading a damaged archive raises, or a file on a damaged disk."""


class BadRow(Exception):
    """This row cannot be used; the message says why and is what the rows are counted by."""


class NotFound(SpellError):
    """There is no file of a source."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a data set on the hub, and the files of one split inside it.

    `patterns` are alternatives in order of preference (`*` and `[…]` as in a shell); every data file that
    matches the first one with any match is read, in sorted order.
    """

    hub: str
    patterns: tuple[str, ...]
    folder: str
    revision: str | None = None


@dataclass
class Data:
    """The rows of one benchmark. `alone` allows `root` itself to be the data set's folder."""

    root: Path | None
    alone: bool = True
    bad: Counter[str] = field(default_factory=Counter)

    def items(self, source: Source, convert: Callable[[int, Row], T]) -> list[T]:
        """`convert(index, row)` of every row; rows for which it fails are counted in `bad`."""
        items = []
        for index, row in enumerate(self.rows(source)):
            try:
                items.append(convert(index, row))
            except BadRow as reason:
                self.bad[str(reason)] += 1
        return items

    def rows(self, source: Source) -> Iterator[Row]:
        """Rows as dictionaries. Raises NotFound, or SpellError for a file that cannot be read."""
        for path, member in self._files(source):
            yield from self._read(path, member)

    def has(self, source: Source) -> bool:
        """Whether the files of an optional source are there. Raises SpellError where they are not what was pinned."""
        try:
            return bool(self._files(source))
        except NotFound:
            return False

    def _files(self, source: Source) -> list[tuple[Path, str]]:
        folders = [_download(source)] if self.root is None else self._candidates(source)
        for folder in folders:
            for pattern in source.patterns:
                if found := _match(folder, pattern):
                    _verify(folder, self.root, [path for path, _ in found])
                    return found
        looked = ", ".join(str(folder) for folder in folders)
        raise NotFound(
            f"no data of {source.hub}: looked in {looked} for {' or '.join(source.patterns)}."
            f" Download it with: hf download --repo-type dataset {source.hub} --local-dir DIR/{source.hub}"
        )

    def _candidates(self, source: Source) -> list[Path]:
        assert self.root is not None
        if not self.root.is_dir():
            raise SpellError(f"the data folder {self.root} does not exist")
        names = (source.hub, source.hub.split("/")[-1], source.folder)
        return [self.root / name for name in names] + ([self.root] if self.alone else [])

    def _read(self, path: Path, member: str) -> Iterator[Row]:
        kind = Path(member or path.name).suffix
        if kind == ".parquet":
            yield from self._parquet(path)
            return
        try:
            yield from self._texts(path, member, kind)
        except _DAMAGED as error:
            raise _unreadable(path, error) from None

    def _texts(self, path: Path, member: str, kind: str) -> Iterator[Row]:
        """Rows of a file of text, or of one in an archive."""
        with zipfile.ZipFile(path).open(member) if member else path.open("rb") as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
            if kind == ".jsonl":
                rows = self._lines(text)
            elif kind in (".tsv", ".csv"):
                csv.field_size_limit(sys.maxsize)
                rows = csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")
            else:
                rows = self._json(text, path)
            for row in rows:
                if broken(row):
                    self.bad[NOT_UTF8] += 1  # no answer could be equal to it
                else:
                    yield row

    def _lines(self, stream: IO[str]) -> Iterator[Row]:
        for line in stream:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                self.bad["not JSON"] += 1
                continue
            if isinstance(row, dict):
                yield row
            else:
                self.bad["not an object"] += 1

    def _json(self, stream: IO[str], path: Path) -> Iterator[Row]:
        try:
            rows = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise SpellError(f"{path} is not valid JSON: {error}") from None
        rows = rows.get("data", [rows]) if isinstance(rows, dict) else rows
        if not isinstance(rows, list):
            raise SpellError(f"{path} holds no list of rows: download it again")
        for row in rows:
            if isinstance(row, dict):
                yield row
            else:
                self.bad["not an object"] += 1

    def _parquet(self, path: Path) -> Iterator[Row]:
        """One by one: a text that is not UTF-8, or a time that Python cannot hold, is one row's fault."""
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=64):
                    for place in range(batch.num_rows):
                        try:
                            [row] = batch.slice(place, 1).to_pylist()
                        except UnicodeDecodeError:
                            self.bad[NOT_UTF8] += 1
                        except (ValueError, OverflowError):
                            self.bad["a value that Python cannot hold"] += 1
                        else:
                            yield row
        except (pyarrow.ArrowException, OSError) as error:
            raise SpellError(f"{path} cannot be read as a Parquet file: {error}") from None


def broken(value: object) -> bool:
    """Whether a JSON value holds half characters, as which bytes that are not UTF-8 are read, too."""
    return has_halves(json.dumps(value, ensure_ascii=False))


def text(row: Row, *names: str) -> str:
    """The first of the named fields that is a non-empty string; raises BadRow."""
    for name in names:
        if isinstance(value := row.get(name), str) and value.strip():
            return value
    raise BadRow(f"no {' or '.join(names)}")


def texts(row: Row, name: str) -> tuple[str, ...]:
    """A field that is a non-empty list of strings; raises BadRow."""
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
        raise BadRow(f"no {name}")
    return tuple(value)


def identity(row: Row, index: int, *names: str) -> str:
    """The row's own id, or its index where it has none."""
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), str(index))


def pin(folder: Path) -> dict[str, str]:
    """Write `manifest.json`: the SHA-256 of every data file below `folder`, checked by every later read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    hashes = {str(path.relative_to(folder)): _sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    return hashes


def _verify(folder: Path, root: Path | None, paths: list[Path]) -> None:
    """Compare files with the manifests of a data set's folder and of those above it, up to `root`."""
    above = [place for place in folder.parents if root and place.is_relative_to(root)]
    for place in (folder, *above):
        if not (manifest := place / MANIFEST).is_file():
            continue
        hashes = json.loads(manifest.read_text(encoding="utf-8"))
        for path in paths:
            name = str(path.relative_to(place))
            if name in hashes and hashes[name] != _sha256(path):
                raise SpellError(
                    f"{path} is not the file that {manifest} names: download it again or pin anew"
                )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _match(folder: Path, pattern: str) -> list[tuple[Path, str]]:
    name, _, member = pattern.partition("!")
    if not folder.is_dir():
        return []
    kinds = ARCHIVES if member else KINDS
    files = (path for path in folder.glob(name) if path.is_file() and path.name != MANIFEST)
    paths = sorted(path for path in files if path.suffix in kinds)
    if not member:
        return [(path, "") for path in paths]
    return [(path, inner) for path in paths for inner in _members(path) if fnmatch(inner, member)]


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(archive.namelist())
    except _DAMAGED as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> SpellError:
    return SpellError(f"{path} cannot be read ({said(error)}): download it again")


def _download(source: Source) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise SpellError(
            f"{source.hub}: install huggingface_hub, or give a local folder with --data"
        ) from None
    wanted = [pattern.partition("!")[0] for pattern in source.patterns]
    try:
        return Path(
            snapshot_download(
                source.hub, repo_type="dataset", revision=source.revision, allow_patterns=wanted
            )
        )
    except Exception as error:  # the hub client has no common base for "offline", "gated" and "not found"
        raise SpellError(
            f"cannot download {source.hub}: {type(error).__name__}: {error}. Without network, put the"
            " data set into a folder and give it with --data"
        ) from None
