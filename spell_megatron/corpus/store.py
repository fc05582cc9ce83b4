"""Clusters on disk: one SQLite file per source, made in one pass over its texts.

Grouping needs documents that may stand far apart, de-duplication needs all that came before: both
live in the file, not in memory. Texts are kept compressed, so that a cluster is read in one place
whatever the source was, and a resumed run sees the corpus it began with even where the source has
changed since. The file takes about a third of the text's size; memory stays at SQLite's page cache
and one block of documents.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

from spell_megatron.base.files import sync
from spell_megatron.config import SourceConfig
from spell_megatron.corpus.cleaning import clean, fingerprint, sketch
from spell_megatron.corpus.clustering import BLOCK, Filler, passages, similar
from spell_megatron.corpus.decontamination import Benchmarks
from spell_megatron.corpus.reading import Skipped, Text, read
from spell_megatron.types import Cluster, Document, SpellError

logger = logging.getLogger(__name__)

Count = Callable[[str], int]

COUNTED = 20_000
"""Documents whose tokens are counted; of later ones every 50th, the others by their characters."""
_PIECE = 1 << 15
"""Characters that are counted at a time: a tokenizer takes a hundred bytes of memory for each."""
_PIECES = 16
"""Pieces of a longer text that are counted, evenly spread."""
SPLIT = 8
"""Passages of a long text that fill one cluster."""
_CACHE_KIB = 64 << 10

_SCHEMA = """
create table documents (id integer primary key, name text, title text, key text, tokens integer, text blob);
create table members (
    cluster integer, position integer, document integer, primary key (cluster, position)
) without rowid;
create table seen (mark integer primary key) without rowid;
create table facts (name text primary key, value text);
"""


class ClusterStore:
    """A source's clusters, by number. `facts` says what the source held and what was left out.

    Clusters are called `<domain>-<digest of all of them>/<number>`: what is remembered of one is never taken for a
    memory of another, which stands at the same place of a corpus that was prepared otherwise.
    """

    def __init__(self, path: Path, domain: str) -> None:
        self.domain = domain
        try:
            # It changes no more, and not every file server has the locks that SQLite asks for.
            self._db = sqlite3.connect(_uri(path, "immutable"), uri=True, check_same_thread=False)
            self.facts = {name: json.loads(value) for name, value in self._db.execute("select * from facts")}
            self._size = int(self.facts["clusters"])
            digest = self.facts.get("digest")  # optional in a prepared corpus
            self._name = f"{domain}-{digest}" if digest else domain
        except (sqlite3.Error, KeyError, ValueError) as error:
            raise SpellError(
                f"the prepared corpus {path} cannot be read ({error}): where its file system does not answer, resume"
                " later; where it is damaged, delete it, and it is made anew of what its source holds then"
            ) from None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int) -> Cluster:
        rows = self._db.execute(
            "select name, text, title from members join documents on id = document"
            " where cluster = ? order by position",
            (number,),
        )
        documents = tuple(Document(name, zlib.decompress(text).decode(), title) for name, text, title in rows)
        if not documents:
            raise IndexError(number)
        return Cluster(f"{self._name}/{number}", self.domain, documents)


def build(
    path: Path,
    source: SourceConfig,
    *,
    budget: int,
    max_documents: int,
    count: Count,
    benchmarks: Benchmarks | None = None,
) -> None:
    """Read `source`, group its documents into clusters of at most `budget` tokens, write them to `path`.

    What `benchmarks` ask about is left out, and listed in a file beside `path` that ends in `.dropped.jsonl`.

    Raises SpellError where nothing usable is found or the file cannot be written. A build that is
    interrupted leaves no file at `path`.
    """
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with closing(sqlite3.connect(_uri(part, "nolock"), uri=True)) as db:
            made = _Build(db, source, budget, max_documents, count, benchmarks)
            made.run()
        if benchmarks:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in made.dropped)
            path.with_suffix(".dropped.jsonl").write_text("".join(lines), encoding="utf-8")
        sync(part)
        part.replace(path)
    except (sqlite3.Error, OSError) as error:
        raise SpellError(f"cannot write the prepared corpus {path}: {error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _uri(path: Path, how: str) -> str:
    return f"{path.resolve().as_uri()}?{how}=1"


class _Build:
    def __init__(
        self,
        db: sqlite3.Connection,
        source: SourceConfig,
        budget: int,
        limit: int,
        count: Count,
        benchmarks: Benchmarks | None,
    ) -> None:
        self.dropped: list[dict[str, Any]] = []
        """What the benchmarks ask about: the text's name, and the match."""
        self._benchmarks = benchmarks
        self._db, self._source, self._budget, self._limit = db, source, budget, limit
        self._meter = _Meter(count)
        self._passage = max(1, budget // min(SPLIT, limit))
        self._skipped = Skipped()
        self._duplicates = self._split = self._divided = 0
        self._digest = blake2b(digest_size=4)
        """Of every text and every cluster, as they are written."""

    def run(self) -> None:
        self._db.executescript(
            f"pragma journal_mode=off; pragma synchronous=off; pragma cache_size=-{_CACHE_KIB};"
        )
        self._db.executescript(_SCHEMA)
        for text in read(self._source, self._skipped):
            self._take(text)
        if self._source.group_by == "given":
            self._split_lone()
        documents = self._one("select count(*) from documents")
        if documents == 0:
            raise SpellError(self._nothing())
        for number, cluster in enumerate(self._clusters()):
            self._digest.update(repr(cluster).encode())
            rows = [(number, position, document) for position, document in enumerate(cluster)]
            self._db.executemany("insert into members values (?, ?, ?)", rows)
        self._db.execute("drop table seen")
        facts = {
            "documents": documents,
            "clusters": self._one("select count(distinct cluster) from members"),
            "tokens": self._one("select sum(tokens) from documents"),
            "digest": self._digest.hexdigest(),
            "duplicates": self._duplicates,
            "split": self._split,
            "divided": self._divided,
            "lengths": {
                "documents": self._spread("count(*)"),
                "tokens": self._spread("sum(tokens)"),
            },
            "skipped": dict(self._skipped.counts.most_common()),
            "examples": self._skipped.first,
        }
        self._db.executemany(
            "insert into facts values (?, ?)", [(k, json.dumps(v)) for k, v in facts.items()]
        )
        self._db.commit()
        left_out = f" ({self._skipped})" if self._skipped.counts else ""
        logger.info(
            f"corpus {self._source.path}: {documents:,} documents, about {facts['tokens']:,} tokens, in"
            f" {facts['clusters']:,} clusters; {self._duplicates:,} duplicates,"
            f" {self._skipped.counts.total():,} skipped{left_out}, {self._split:,} long texts split,"
            f" {self._divided:,} groups over the budget divided"
        )

    def _take(self, text: Text) -> None:
        """Clean one text and keep it, unless it is empty or repeats another."""
        body = clean(text.text)
        if not body.strip():
            return self._skipped.add("empty", text.name)
        if self._benchmarks and (match := self._benchmarks.match(body)):
            self.dropped.append({"text": text.name, **asdict(match)})
            return self._skipped.add(
                f"in the benchmark {match.benchmark}", text.name, str(match), logging.INFO
            )
        mark = fingerprint(body)
        if self._repeats(mark, body):
            self._duplicates += 1
            return
        key = f"{mark:x}" if self._source.group_by == "random" else text.cluster
        tokens = self._meter(body)
        if tokens > self._budget // 2:
            self._insert_passages(text.name, text.title, key, tokens, body)
        else:
            self._insert(text.name, text.title, key, tokens, body)

    def _repeats(self, mark: int, body: str) -> bool:
        """Whether a text resembles one that was kept. Those that were dropped leave no marks: nothing would be left
        of a long chain of texts of which each resembles only the next."""
        if self._source.deduplicate == "none":
            return False
        marks = [mark, *(sketch(body) if self._source.deduplicate == "near" else ())]
        query = f"select 1 from seen where mark in ({', '.join('?' * len(marks))})"
        if self._db.execute(query, marks).fetchone():
            return True
        self._db.executemany("insert or ignore into seen values (?)", [(m,) for m in marks])
        return False

    def _insert(self, name: str, title: str, key: str, tokens: int, body: str) -> None:
        self._digest.update(body.encode())
        row = (name, title, key, tokens, zlib.compress(body.encode(), 1))
        self._db.execute("insert into documents (name, title, key, tokens, text) values (?, ?, ?, ?, ?)", row)

    def _insert_passages(self, name: str, title: str, key: str, tokens: int, body: str) -> None:
        """A text too long to share a cluster becomes several documents."""
        parts = passages(body, max(1, self._passage * len(body) // tokens))
        self._split += len(parts) > 1
        for number, part in enumerate(parts, start=1):
            self._insert(f"{name}#passage{number}", title, key, self._meter(part), part)

    def _split_lone(self) -> None:
        """A text that is alone in its group becomes passages too: a question needs several documents."""
        lone = self._db.execute(
            "select min(id) from documents group by key having count(*) = 1 and min(tokens) > ? order by 1",
            (self._passage,),
        )
        for (number,) in lone.fetchall():
            name, title, key, tokens, text = self._db.execute(
                "delete from documents where id = ? returning name, title, key, tokens, text", (number,)
            ).fetchone()
            self._insert_passages(name, title, key, tokens, zlib.decompress(text).decode())

    def _clusters(self) -> Iterator[list[int]]:
        """Lists of document numbers. A document left alone joins others of its kind."""
        alone = Filler(self._budget, self._limit)
        for cluster in self._groups():
            if len(cluster) > 1:
                yield cluster
            elif (full := alone.add(cluster[0], self._tokens(cluster[0]))) is not None:
                yield full
        yield from alone.close()

    def _groups(self) -> Iterator[list[int]]:
        rows = self._db.execute("select key, id, tokens from documents order by key, id")
        match self._source.group_by:
            case "given":
                for _, group in groupby(rows, key=lambda row: row[0]):
                    for number, cluster in enumerate(_fill(group, Filler(self._budget, self._limit))):
                        self._divided += number == 1
                        yield cluster
            case "random":
                yield from _fill(rows, Filler(self._budget, self._limit, open_bins=SPLIT))
            case "similarity":
                texts = self._db.execute("select id, tokens, text from documents order by id")
                while block := texts.fetchmany(BLOCK):
                    readable = [
                        (number, tokens, zlib.decompress(text).decode()) for number, tokens, text in block
                    ]
                    yield from similar(readable, self._budget, self._limit)

    def _tokens(self, document: int) -> int:
        return self._one("select tokens from documents where id = ?", document)

    def _one(self, query: str, *values: int) -> int:
        return int(self._db.execute(query, values).fetchone()[0])

    def _spread(self, measure: str) -> list[int]:
        """The least, the median and the largest of a measure of clusters."""
        query = f"select {measure} from members join documents on id = document group by cluster order by 1"
        values = [value for (value,) in self._db.execute(query)]
        return [values[0], values[len(values) // 2], values[-1]]

    def _nothing(self) -> str:
        left_out = f"skipped: {self._skipped}" if self._skipped.counts else "it has no files"
        causes = "".join(f"\n  {message}" for message in self._skipped.first.values())
        return (
            f"the corpus {self._source.path} has no usable text; {left_out}{causes}\n"
            "A corpus is a folder of UTF-8 text, Markdown or HTML, or rows of JSON lines, CSV or Parquet."
        )


def _fill(rows: Iterable[tuple[str, int, int]], filler: Filler) -> Iterator[list[int]]:
    for _, document, tokens in rows:
        if (full := filler.add(document, tokens)) is not None:
            yield full
    yield from filler.close()


class _Meter:
    """Tokens of a text: counted for the first texts, later sampled, so that a large corpus starts soon.

    The budget is held exactly when a cluster is drawn, whatever was estimated here.
    """

    def __init__(self, count: Count) -> None:
        self._count = count
        self._calls = 0
        self._characters = self._tokens = 1

    def __call__(self, text: str) -> int:
        self._calls += 1
        if self._calls <= COUNTED or self._calls % 50 == 0:
            tokens = max(1, self._counted(text))
            self._characters += len(text)
            self._tokens += tokens
            return tokens
        return max(1, len(text) * self._tokens // self._characters)

    def _counted(self, text: str) -> int:
        starts = range(0, len(text), _PIECE)
        if len(starts) <= _PIECES:
            return sum(self._count(text[start : start + _PIECE]) for start in starts)
        sample = starts[:: -(-len(starts) // _PIECES)]
        read = sum(len(text[start : start + _PIECE]) for start in sample)
        return sum(self._count(text[start : start + _PIECE]) for start in sample) * len(text) // read
