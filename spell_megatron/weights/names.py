"""The rows of the name table that this rank's Megatron modules hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spell_megatron.types import SpellError
from spell_megatron.weights.families import Family
from spell_megatron.weights.table import EMBEDDING, HEAD, Split


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of this rank."""

    parameter: nn.Parameter
    split: Split
    hf_names: tuple[str, ...]
    order: tuple[int, ...]
    """Position in the model: sorts equally on every rank."""
    shadow: bool = False
    """A copy, for its own stage, of what another parameter holds: loaded with it, and streamed by that one alone."""
    expert: int | None = None
    """Index among this rank's experts; `hf_names` then name expert `{expert}` of EP rank 0 as a template."""


_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_NAME = re.compile(r"(mlp\.experts\.linear_fc[12]\.weight)(\d+)")
_LAST = 10**6
"""Beyond any layer."""


def weights_of(chunks: Sequence[Any], family: Family, tied: bool) -> Iterator[Weight]:
    """Every parameter of this rank's pipeline chunks (each a GPTModel), by the names of a family. With tied embeddings
    the last stage's copy is listed under the embedding's name, as its shadow."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _weight(name, parameter, chunk, family, tied)


def _weight(name: str, parameter: nn.Parameter, chunk: Any, family: Family, tied: bool) -> Weight:
    layer, expert, megatron = None, None, name
    if within := _LAYER_NAME.fullmatch(name):
        layer, megatron = chunk.decoder.layers[int(within[1])].layer_number - 1, within[2]
    if numbered := _EXPERT_NAME.fullmatch(megatron):
        megatron, expert = numbered[1], int(numbered[2])
    shadow = tied and megatron == HEAD
    row = next((row for row in family.rows if row.megatron == (EMBEDDING if shadow else megatron)), None)
    if row is None:
        raise SpellError(f"the name table of {family.title} has no row for Megatron's parameter {megatron!r}")
    place = family.rows.index(row)
    if layer is None:
        first = next(i for i, other in enumerate(family.rows) if other.layered)
        order: tuple[int, ...] = (-1 if place < first else _LAST, place)
    else:
        order = (layer, place) if expert is None else (layer, place, expert)
    names = tuple(name.format(layer=layer, expert="{expert}") for name in row.names)
    return Weight(parameter, row.split, names, order, shadow, expert)
