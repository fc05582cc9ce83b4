"""Which cluster and which task come next: by weight, balanced, and resumable to the very draw."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from spell_megatron.config import CorpusConfig, SourceConfig
from spell_megatron.corpus.decontamination import Benchmarks
from spell_megatron.corpus.store import ClusterStore, Count, build
from spell_megatron.corpus.worlds import WORLDS, GeneratedWorld
from spell_megatron.types import Cluster, SpellError

logger = logging.getLogger(__name__)


_NOT_READ = {"weight": 0, "tasks": (), "clusters": None}
"""Keys of a source that change what is drawn of it, and not what is read."""


class SourceClusters(Protocol):
    """A source's clusters, by number, and what is known of them."""

    @property
    def facts(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Cluster: ...


@dataclasses.dataclass
class _Stream:
    """One source: its clusters, and how far it has been read."""

    source: SourceConfig
    domain: str
    clusters: SourceClusters
    share: float
    drawn: int = 0
    credit: float = 0.0

    @property
    def size(self) -> int:
        """Clusters that are drawn: all, or as many as the source is capped at."""
        return min(len(self.clusters), self.source.clusters or len(self.clusters))

    @property
    def epoch_length(self) -> int:
        return self.size * len(self.source.tasks)


class ClusterSampler:
    """Draws (cluster, task) pairs from the sources of a corpus.

    An epoch of a source brings every pair of a cluster and a task once, tasks in turn, clusters in
    an order that depends on (seed, epoch, task) alone. So the curriculum meets each pair again in
    the next epoch, and a position is two numbers. Sources take turns in proportion to their weights.

    `count` gives the tokens of a text. `folder` keeps the prepared corpus for a later resume;
    without it, it lives in a temporary folder as long as this object.
    Raises SpellError for a source that holds nothing usable.
    """

    def __init__(self, corpus: CorpusConfig, count: Count, seed: int, folder: Path | None = None) -> None:
        self._corpus, self._count, self._seed = corpus, count, seed
        self._temporary = None if folder else TemporaryDirectory(prefix="spell-corpus-")
        self._folder = folder or Path(self._temporary.name)  # type: ignore[union-attr]
        domains = [source.domain or _domain(source.path) for source in corpus.sources]
        if not domains:
            raise SpellError("corpus.sources is empty: give at least one source")
        if twice := {domain for domain in domains if domains.count(domain) > 1}:
            raise SpellError(
                f"several corpus sources are called {sorted(twice)[0]!r}: give each its own `domain`"
            )
        total = sum(source.weight for source in corpus.sources)
        self._streams = [
            _Stream(source, domain, self._open(source, domain), source.weight / total)
            for source, domain in zip(corpus.sources, domains, strict=True)
        ]

    @property
    def domains(self) -> dict[str, int]:
        """Number of clusters of each domain that are drawn."""
        return {stream.domain: stream.size for stream in self._streams}

    @property
    def visits(self) -> dict[str, float]:
        """How often each pair of a cluster and a task was drawn so far, by domain."""
        return {stream.domain: stream.drawn / stream.epoch_length for stream in self._streams}

    def expected_visits(self, draws: int) -> dict[str, float]:
        """The same after so many draws in all."""
        return {stream.domain: draws * stream.share / stream.epoch_length for stream in self._streams}

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What each source held and what of it was left out, by domain."""
        return {stream.domain: stream.clusters.facts for stream in self._streams}

    def draw(self, n: int) -> list[tuple[Cluster, str]]:
        """The next `n` pairs. Every cluster holds the configured token and document limits exactly."""
        return [self._next() for _ in range(n)]

    def state(self) -> dict[str, Any]:
        """Where the sampler stands, for JSON."""
        return {
            stream.domain: {
                "epoch": stream.drawn // stream.epoch_length,
                "position": stream.drawn % stream.epoch_length,
                "length": stream.epoch_length,
                "credit": stream.credit,
            }
            for stream in self._streams
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. A source that is new or of another size starts an epoch."""
        for stream in self._streams:
            place = state.get(stream.domain)
            if place is None:
                logger.warning("corpus %s is new to this run: it starts at its beginning", stream.domain)
                stream.drawn, stream.credit = 0, 0.0
                continue
            position = place["position"]
            if place["length"] != stream.epoch_length:
                logger.warning("corpus %s has changed its size: its epoch starts anew", stream.domain)
                position = 0
            stream.drawn = place["epoch"] * stream.epoch_length + position
            stream.credit = place["credit"]

    def _open(self, source: SourceConfig, domain: str) -> SourceClusters:
        if source.path in WORLDS:
            return _Generated(WORLDS[source.path], self._seed, self._corpus.toy_clusters, domain)
        limits = (self._corpus.cluster_tokens, self._corpus.max_documents)
        values = json.dumps([dataclasses.asdict(source) | _NOT_READ, *limits, *self._corpus.benchmarks])
        path = self._folder / f"{domain}-{blake2b(values.encode(), digest_size=4).hexdigest()}.sqlite"
        if not path.exists():
            budget, most = limits
            build(
                *(path, source),
                budget=budget,
                max_documents=most,
                count=self._count,
                benchmarks=self._benchmarks,
            )
        return ClusterStore(path, domain)

    @cached_property
    def _benchmarks(self) -> Benchmarks | None:
        """Read once for all sources, and not at all where every source is prepared."""
        return Benchmarks(self._corpus.benchmarks) if self._corpus.benchmarks else None

    def _next(self) -> tuple[Cluster, str]:
        for stream in self._streams:
            stream.credit += stream.share
        stream = max(self._streams, key=lambda s: s.credit)
        stream.credit -= 1.0
        epoch, position = divmod(stream.drawn, stream.epoch_length)
        stream.drawn += 1
        turn, which = divmod(position, len(stream.source.tasks))
        task = stream.source.tasks[which]
        number = permuted(turn, stream.size, f"{self._seed}/{stream.domain}/{epoch}/{task}")
        if stream.size < len(stream.clusters):
            number = permuted(number, len(stream.clusters), f"{self._seed}/{stream.domain}/chosen")
        return self._fit(stream.clusters[number]), task

    def _fit(self, cluster: Cluster) -> Cluster:
        """`cluster` within the token and document limits: what is over is cut from its end."""
        room, kept = self._corpus.cluster_tokens, []
        for document in cluster.documents[: self._corpus.max_documents]:
            text, tokens = document.text, self._count(document.text)
            while tokens > room and text:
                text = text[: min(len(text) - 1, len(text) * room // tokens)]
                tokens = self._count(text)
            if not text:
                break
            kept.append(document if text is document.text else dataclasses.replace(document, text=text))
            room -= tokens
        return (
            cluster
            if kept == list(cluster.documents)
            else dataclasses.replace(cluster, documents=tuple(kept))
        )


def _domain(path: str) -> str:
    """The last part of a path or hub id, without a file's endings."""
    place = Path(path.partition(":")[0])
    return place.name.partition(".")[0] or place.name if place.is_file() else place.name


class _Generated:
    """Clusters of a generated world, made when they are asked for."""

    def __init__(self, world: GeneratedWorld, seed: int, size: int, domain: str) -> None:
        self._world, self._seed, self._size, self._domain = world, seed, size, domain

    @property
    def facts(self) -> dict[str, Any]:
        return {"clusters": self._size}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int) -> Cluster:
        return dataclasses.replace(self._world.cluster(self._seed, number), domain=self._domain)


def permuted(index: int, size: int, key: str) -> int:
    """Where `index` goes in a random order of `range(size)` that `key` names, without making the order.

    A Feistel network over the next power of four, walked until it lands inside the range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            digest = blake2b(f"{key}/{turn}/{right}".encode(), digest_size=4).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        index = left << half | right
        if index < size:
            return index
