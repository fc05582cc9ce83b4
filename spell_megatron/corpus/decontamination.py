"""Documents of a corpus that a benchmark asks about are left out, or its figures would measure memory.

As in the paper (arXiv 2509.23863): a document that repeats one of a benchmark is found by MinHash, 128 permutations,
at a Jaccard similarity of 0.8 of five-word sequences (Broder 1997). A question is too short for that, or a part of a
page that holds more: a document is left out that holds it word by word. Of a benchmark's files every long text of every
row counts, whatever it is called, and so does a paragraph of some lines. A shorter one may stand anywhere, "(in
thousands, except per share amounts)": it counts where a question stands.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

from rensa import RMinHash, RMinHashLSH

from spell_megatron.config import EVERY_TEXT, SourceConfig
from spell_megatron.corpus.cleaning import MIN_SHINGLES, SHINGLE, folded, split_words
from spell_megatron.corpus.reading import Skipped, read
from spell_megatron.types import SpellError

SIMILARITY, PERMUTATIONS = 0.8, 128
BANDS = 32
"""Bands of four: a pair at the threshold is compared with probability 1 - (1 - 0.8^4)^32, above 0.9999."""
SHORTEST = MIN_SHINGLES + SHINGLE - 1
"""Words of the shortest text that is compared as a document."""
QUESTION, LONGEST_QUESTION = 8, 400
"""Words of the shortest and the longest question: fewer stand in texts that have nothing to do with it."""
PARAGRAPH = 30
"""Words of the shortest text that is compared word by word whatever its column: an article's introduction."""
OFTEN = 10
"""A short text that stands in more rows of a file than this is what its questions have in common."""
_ROW = re.compile(r".*?#\d+(?=[.#]|\Z)")
"""The row of a place: its file and number."""
_SIGN = re.compile(r"[^\w\s]|_")
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_PASSAGE = re.compile(r"^\s*(?:Passage|Document) \d+:?\s*$", re.MULTILINE)
"""What stands between the passages of one text in LongBench."""

_log = logging.getLogger(__name__)
Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """What a text has in common with a benchmark: `place` is the text there, `similarity` 1 for a question it holds."""

    kind: str
    place: str
    similarity: float = 1.0

    @property
    def benchmark(self) -> str:
        """The benchmark's file."""
        return _file(self.place)

    def __str__(self) -> str:
        return f"{self.kind} {self.place}, similarity {self.similarity:.2f}"


class Benchmarks:
    """An index of everything that some benchmarks' files hold. Raises SpellError for a path without a text."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._documents: list[tuple[str, RMinHash]] = []
        self._similar = RMinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._starts: set[Words] = set()
        self._questions: dict[Words, dict[int, dict[bytes, str]]] = {}
        """A question's place, by its first words, its length and its digest."""
        short = _Short()
        for path in paths:
            if packed := _packed(path):
                raise SpellError(
                    f"corpus.benchmarks: {packed} is an archive, of which nothing would be compared: unpack it beside"
                )
            skipped, empty = Skipped(), True
            for text in read(SourceConfig(path=path, text_field=EVERY_TEXT), skipped):
                empty = False
                self._add(text.name, _words(text.text), short, least=QUESTION if text.asks else PARAGRAPH)
                for passage in _passages(text.text):
                    self._add(text.name, _words(passage), short, least=PARAGRAPH)
            if empty:
                why = str(skipped) if skipped.counts else "it has no files"
                raise SpellError(f"corpus.benchmarks: {path} holds no text to compare with ({why})")
            if skipped.counts:
                _log.warning("parts of the benchmarks in %s are left out and not compared: %s", path, skipped)
        for place, question in short.rare():
            self._add_question(place, question)

    def match(self, text: str) -> Match | None:
        """The benchmark's text that this one repeats or holds."""
        words = _words(text)
        if (found := self._repeated(words)) is not None:
            return found
        for start, pair in enumerate(pairwise(words)):
            if pair in self._starts:
                for length, places in self._questions.get(words[start : start + QUESTION], {}).items():
                    if (place := places.get(_digest(words[start : start + length]))) is not None:
                        return Match("question", place)
        return None

    def _repeated(self, words: Words) -> Match | None:
        if len(words) < SHORTEST:
            return None
        sketch = _sketch(words)
        near = (self._documents[number] for number in self._similar.query(sketch))
        similarity, place = max(((sketch.jaccard(other), place) for place, other in near), default=(0.0, ""))
        return Match("document", place, similarity) if similarity >= SIMILARITY else None

    def _add(self, place: str, words: Words, short: _Short, least: int) -> None:
        """A text as a document, a question or both; one for `short` where it says as much as `least` words."""
        long, tells = len(words) >= SHORTEST, _tells(words)
        if long:
            self._add_document(place, words)
        if tells >= (QUESTION if long else least) and len(words) <= LONGEST_QUESTION:
            question = _Question(words[:QUESTION], len(words), _digest(words))
            if long:
                self._add_question(place, question)
            else:
                short.add(place, question)

    def _add_document(self, place: str, words: Words) -> None:
        sketch = _sketch(words)
        self._similar.insert(len(self._documents), sketch)
        self._documents.append((place, sketch))

    def _add_question(self, place: str, question: _Question) -> None:
        self._starts.add(question.start[:2])
        by_length = self._questions.setdefault(question.start, {})
        by_length.setdefault(question.length, {}).setdefault(question.digest, place)


class _Question(NamedTuple):
    """What a question is known by: its first words, how many it has, and a digest of them all."""

    start: Words
    length: int
    digest: bytes


class _Short:
    """Short texts in the order of their rows, each with a place, and of each in how many rows of a file it stands."""

    def __init__(self) -> None:
        self._places: dict[_Question, str] = {}
        self._rows: defaultdict[str, Counter[_Question]] = defaultdict(Counter)
        self._row, self._of_row = "", set[_Question]()

    def add(self, place: str, question: _Question) -> None:
        if (row := _row(place)) != self._row:
            self._row, self._of_row = row, set()
        if question not in self._of_row:
            self._of_row.add(question)
            self._places.setdefault(question, place)
            self._rows[_file(place)][question] += 1

    def rare(self) -> Iterator[tuple[str, _Question]]:
        """Those that stand in at most OFTEN rows of every file."""
        often = {text for rows in self._rows.values() for text, count in rows.items() if count > OFTEN}
        return ((place, text) for text, place in self._places.items() if text not in often)


def _packed(path: str) -> Path | None:
    """An archive among a benchmark's files, which readers of a corpus leave alone, and whose files are not there."""
    place = Path(path).expanduser()
    files = [file for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()]
    there = {file.name for file in files}
    archives = (file for file in files if any(suffix.lower() in _ARCHIVES for suffix in file.suffixes[-2:]))
    return next((file for file in archives if not _members(file) <= there), None)


def _members(archive: Path) -> set[str]:
    """Names of a ZIP file's files, without their folders; its own where it is of another kind, or damaged."""
    try:
        with ZipFile(archive) as file:
            names = [entry.filename for entry in file.infolist() if not entry.is_dir()]
    except (BadZipFile, OSError):
        return {f"{archive.name}, unpacked"}
    return {Path(name).name for name in names if not name.startswith("__MACOSX/")}


def _file(place: str) -> str:
    return place.partition("#")[0]


def _row(place: str) -> str:
    return found[0] if (found := _ROW.match(place)) else place


def _passages(text: str) -> Iterator[str]:
    """The passages of a text that is several; each without its first line, too, which may be its title."""
    passages = _PASSAGE.split(text)
    for passage in passages if len(passages) > 1 else ():
        yield passage
        yield passage.strip().partition("\n")[2]


def _words(text: str) -> Words:
    return tuple(split_words(_SIGN.sub(" ", folded(text))))


def _tells(words: Words) -> float:
    """As many words as a text says: 0 for numbers and `1 + 2 = x`, which have no two letters; characters of a script
    without blanks say half as much as a word."""
    if sum(map(str.isalpha, "".join(words))) < 2:
        return 0.0
    return sum(1.0 if word.isascii() or len(word) > 1 else 0.5 for word in words)


def _digest(words: Words) -> bytes:
    return blake2b("\0".join(words).encode(), digest_size=12).digest()


def _sketch(words: Words) -> RMinHash:
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=0)
    sketch.update([" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)])
    return sketch
