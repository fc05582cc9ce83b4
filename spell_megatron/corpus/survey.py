"""What a run would read of its corpus, before there is a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spell_megatron.config import RECIPES, Config, CorpusConfig, SourceConfig, load_config
from spell_megatron.config.reading import build, override
from spell_megatron.corpus.sampler import ClusterSampler
from spell_megatron.corpus.store import Count
from spell_megatron.types import Cluster

_SHOWN = 300
"""Characters of a document in a sample."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Facts of each source, by domain, and some clusters as they would be drawn."""

    sources: dict[str, dict[str, Any]]
    samples: tuple[Cluster, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def shown(self) -> RenderableType:
        return Group(*self._sources(), *map(_sample, self.samples))

    def _sources(self) -> list[RenderableType]:
        held = Table("domain", "clusters", "documents", "tokens", "documents of a cluster", "its tokens")
        left = Table("domain", "left out", "because it is", "for example")
        for domain, facts in self.sources.items():
            spreads = (_spread(facts.get("lengths", {}).get(what)) for what in ("documents", "tokens"))
            held.add_row(Text(domain), *(_number(facts.get(key)) for key in _COUNTED), *spreads)
            if duplicates := facts.get("duplicates"):
                left.add_row(Text(domain), _number(duplicates), "a duplicate", "")
            for reason, count in facts.get("skipped", {}).items():
                left.add_row(Text(domain), _number(count), Text(reason), Text(facts["examples"][reason]))
        return [held, left] if left.row_count else [held]


_COUNTED = ("clusters", "documents", "tokens")


def meant(source: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe; or, for the path of a source, that of the paper's 16K recipes with it alone.

    Overrides without a dot are then keys of the source. Raises ConfigError for a key or a value that is wrong.
    """
    if (RECIPES / f"{source}.yaml").is_file() or Path(source).suffix in (".yaml", ".yml"):
        return load_config(source, overrides)
    own: dict[str, Any] = {"path": source}
    for text in overrides:
        if "." not in text.partition("=")[0]:
            override(SourceConfig, own, text)
    config = load_config("paper-16k", [text for text in overrides if "." in text.partition("=")[0]])
    only = build(SourceConfig, own, f"{source} is not a valid source")
    return replace(config, corpus=replace(config.corpus, sources=(only,)))


def survey(corpus: CorpusConfig, count: Count, seed: int = 0, samples: int = 3) -> Survey:
    """Prepare the corpus as a run does, in a temporary folder. Raises SpellError where nothing usable is found."""
    sampler = ClusterSampler(corpus, count, seed)
    drawn = [cluster for cluster, _ in sampler.draw(samples)]
    return Survey(sampler.facts, tuple(drawn))


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _spread(values: list[int] | None) -> str:
    """Least, median and largest."""
    return " – ".join(map(_number, values)) if values else "-"


def _sample(cluster: Cluster) -> RenderableType:
    texts = [f"{document.title or document.id}\n{_short(document.text)}" for document in cluster.documents]
    return Panel(Text("\n\n".join(texts)), title=Text(f"{cluster.id}: {len(texts)} documents"), expand=False)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text):,} characters)"
