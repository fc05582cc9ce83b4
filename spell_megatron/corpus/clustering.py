"""Which documents are read together: filling clusters under a token budget.

Everything here is a stream: memory holds the clusters that are open, and for similarity one block
of documents.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from spell_megatron.corpus.cleaning import TOGETHER, folded
from spell_megatron.corpus.reading.text import cut

BLOCK = 4096
"""Documents among which neighbours are sought; similarity does not reach from one block into another."""
_DIMENSIONS = 256
_BUCKETS = 1 << 16
_READ_CHARACTERS = 20_000
_WORD = re.compile(rf"(?=([{TOGETHER}]{{2}}))|[^\W{TOGETHER}]+")
"""A word; two characters side by side of a script that puts no blank between words."""


def passages(text: str, size: int) -> list[str]:
    """`text` cut into parts of at most `size` characters, as equal as paragraph ends allow.

    A part ends at a blank line if its last half has one, else at a line, a sentence, a word.
    Nothing is lost but white space at the cuts.
    """
    parts: list[str] = []
    start = 0
    while len(text) - start > size:
        aim = -(-(len(text) - start) // -(-(len(text) - start) // size))
        end = cut(text, start + aim // 2, start + aim, ("\n\n", "\n", ". ", " "))
        parts.append(text[start:end].strip())
        start = end
    parts.append(text[start:].strip())
    return [part for part in parts if part]


@dataclass
class _Bin:
    documents: list[int] = field(default_factory=list)
    tokens: int = 0

    def takes(self, tokens: int, budget: int, limit: int) -> bool:
        return not self.documents or (self.tokens + tokens <= budget and len(self.documents) < limit)

    def add(self, document: int, tokens: int) -> None:
        self.documents.append(document)
        self.tokens += tokens


class Filler:
    """First-fit filling: up to `open_bins` clusters are open; where none has room, the fullest is finished.

    With one open bin documents keep their order.
    """

    def __init__(self, budget: int, limit: int, open_bins: int = 1) -> None:
        self._budget, self._limit, self._room = budget, limit, open_bins
        self._bins: list[_Bin] = []

    def add(self, document: int, tokens: int) -> list[int] | None:
        """Place a document; the cluster that had to be finished for it, if any."""
        finished = None
        home = next((b for b in self._bins if b.takes(tokens, self._budget, self._limit)), None)
        if home is None:
            if len(self._bins) == self._room:
                fullest = max(self._bins, key=lambda b: b.tokens)
                self._bins.remove(fullest)
                finished = fullest.documents
            home = _Bin()
            self._bins.append(home)
        home.add(document, tokens)
        return finished

    def close(self) -> list[list[int]]:
        bins, self._bins = self._bins, []
        return [b.documents for b in bins]


def similar(block: list[tuple[int, int, str]], budget: int, limit: int) -> Iterator[list[int]]:
    """Clusters of documents (id, tokens, text) that resemble one another.

    The first document that is still free takes its nearest free neighbours, by the cosine of
    hashed TF-IDF vectors, until the budget is full.
    """
    vectors = _vectors([text for _, _, text in block])
    free = np.ones(len(block), dtype=bool)
    reach = 4 * limit
    for leader in range(len(block)):
        if not free[leader]:
            continue
        free[leader] = False
        cluster = _Bin()
        cluster.add(block[leader][0], block[leader][1])
        # What is taken already sorts last.
        distance = np.where(free, -(vectors @ vectors[leader]), np.inf)
        nearest = (
            np.argpartition(distance, reach)[: reach + 1] if reach < len(block) else np.arange(len(block))
        )
        for index in nearest[np.lexsort((nearest, distance[nearest]))]:
            if free[index] and cluster.takes(block[index][1], budget, limit):
                cluster.add(block[index][0], block[index][1])
                free[index] = False
        yield cluster.documents


def _vectors(texts: Iterable[str]) -> np.ndarray:
    """Unit TF-IDF vectors [documents, 256], words hashed (Weinberger et al. 2009)."""
    counts = [_counted(text) for text in texts]
    frequency = np.zeros(_BUCKETS)
    for hashes, _ in counts:
        frequency[hashes % _BUCKETS] += 1
    weight = np.log((1 + len(counts)) / (1 + frequency))
    vectors = np.zeros((len(counts), _DIMENSIONS), dtype=np.float32)
    for row, (hashes, times) in zip(vectors, counts, strict=True):
        signs = np.where(hashes >> 31, 1.0, -1.0)
        np.add.at(row, (hashes >> 16) % _DIMENSIONS, signs * (1 + np.log(times)) * weight[hashes % _BUCKETS])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = vectors / np.maximum(norms, 1e-9)
    return unit


def _counted(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of a text's words, and how often each is there: uint32 and int64 [words]."""
    words = (match[1] or match[0] for match in _WORD.finditer(folded(text[:_READ_CHARACTERS])))
    return np.unique(
        np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint32), return_counts=True
    )
