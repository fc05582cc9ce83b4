"""What a model's config.json says of its shape. No torch: the planner reads it too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spell_megatron.types import SpellError
from spell_megatron.weights.families import Family
from spell_megatron.weights.keys import HfConfig, read_config
from spell_megatron.weights.table import Dimension, Row

Sizes = tuple[int, ...]
_MOST = 10_000_000
"""Tensors of a model; the largest have a hundredth of it."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder of a family."""

    family: Family
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tied: bool
    norm_eps: float
    max_positions: int
    """RoPE scaling counted in."""
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    norm_topk: bool = True

    def rows(self) -> Iterator[Row]:
        """Those of the family's name table that this model has."""
        having = self.family.having - ({"untied"} if self.tied else set())
        return (row for row in self.family.rows if row.having in having)

    def sizes(self, row: Row) -> list[Sizes]:
        """Sizes of each Hugging Face tensor of a row."""
        length: dict[Dimension, int] = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "queries": self.heads * self.head_dim,
            "keys": self.kv_heads * self.head_dim,
            "head": self.head_dim,
            "ffn": self.ffn,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn,
        }
        return [tuple(length[name] for name in size) for size in row.sizes]

    def elements(self, row: Row) -> int:
        """The size of a row's parameter in one layer and of one expert, whole."""
        return sum(map(math.prod, self.sizes(row)))

    def copies(self, row: Row) -> int:
        """How often the model has it: by layers and experts."""
        return (self.layers if row.layered else 1) * (self.experts if row.expert else 1)

    def tensors(self) -> Iterator[tuple[str, Sizes]]:
        """Hugging Face name and size of every tensor of the model."""
        for row in self.rows():
            for layer in range(self.layers if row.layered else 1):
                for expert in range(self.experts if row.expert else 1):
                    for name, size in zip(row.names, self.sizes(row), strict=True):
                        yield name.format(layer=layer, expert=expert), size


def model_shape(folder: Path, families: Sequence[str] = ()) -> ModelShape:
    """The shape that config.json gives; `families` are import paths of a user's own.

    Raises SpellError for any key that is not understood (`keys`).
    """
    config = read_config(folder, families)
    values, size = config.values, config.size
    heads = size("num_attention_heads")
    experts = 0
    if config.family.experts:
        experts = size("num_experts" if "num_experts" in values else "num_local_experts")
    shape = ModelShape(
        family=config.family,
        vocab=size("vocab_size"),
        hidden=size("hidden_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=heads if values.get("num_key_value_heads", 0) is None else size("num_key_value_heads"),
        head_dim=size("head_dim") if "head_dim" in values else size("hidden_size") // heads,
        ffn=size("intermediate_size"),
        tied=bool(values.get("tie_word_embeddings", False)),
        norm_eps=config.number("rms_norm_eps", float),
        max_positions=_positions(config),
        experts=experts,
        experts_per_token=size("num_experts_per_tok") if experts else 0,
        expert_ffn=size("moe_intermediate_size") if experts else 0,
        norm_topk=bool(values.get("norm_topk_prob", False)) if experts else True,
    )
    if shape.heads % shape.kv_heads:
        raise SpellError(f"{config.path}: {heads} heads do not share {shape.kv_heads} key-value heads")
    if shape.experts_per_token > experts:
        raise SpellError(
            f"{config.path}: num_experts_per_tok={shape.experts_per_token} is more than {experts} experts"
        )
    if (tensors := sum(shape.copies(row) * len(row.names) for row in shape.rows())) > _MOST:
        raise SpellError(
            f"{config.path}: {shape.layers:,} layers come to {tensors:,} tensors: no model has so many; copy the model"
            " folder again"
        )
    return shape


def _positions(config: HfConfig) -> int:
    """How many positions the model is meant for; a YaRN factor may reach beyond `max_position_embeddings`."""
    given, scaling = config.size("max_position_embeddings"), config.rope
    return max(
        given, int((scaling.get("factor") or 1) * (scaling.get("original_max_position_embeddings") or 0))
    )
