"""THE name table: which Hugging Face tensors a Megatron parameter holds, and how it is cut.

Import, export and resync all read this table, and nothing else knows a weight's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torch import nn


class Cut(Enum):
    """How a parameter lies over the tensor-parallel ranks."""

    NONE = auto()
    """The same on every rank."""
    ROWS = auto()
    """Dimension 0 (column-parallel in Megatron's words: the output features)."""
    COLUMNS = auto()
    """Dimension 1 (row-parallel: the input features)."""
    GATED = auto()
    """Gate over up projection, each cut by rows."""
    QKV = auto()
    """Per key-value head: its queries, its key, its value; the stack cut by rows."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of this rank."""

    parameter: nn.Parameter
    cut: Cut
    hf_names: tuple[str, ...]
    order: tuple[int, ...]
    """Position in the model: sorts equally on every rank."""
    shadow: bool = False
    """A copy, for its own stage, of what another parameter holds: loaded with it, and streamed by that one alone."""
    expert: int | None = None
    """Index among this rank's experts; `hf_names` then name expert `{expert}` of EP rank 0 as a template."""


_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_OUTER = {
    "embedding.word_embeddings.weight": (Cut.ROWS, _EMBEDDING),
    "decoder.final_layernorm.weight": (Cut.NONE, _FINAL_NORM),
    "output_layer.weight": (Cut.ROWS, _HEAD),
}
_LAYER: dict[str, tuple[Cut, tuple[str, ...]]] = {
    "self_attention.linear_qkv.layer_norm_weight": (Cut.NONE, ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (Cut.QKV, tuple(f"self_attn.{x}_proj.weight" for x in "qkv")),
    "self_attention.linear_qkv.bias": (Cut.QKV, tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
    "self_attention.q_layernorm.weight": (Cut.NONE, ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": (Cut.NONE, ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": (Cut.COLUMNS, ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.layer_norm_weight": (Cut.NONE, ("post_attention_layernorm.weight",)),
    "pre_mlp_layernorm.weight": (Cut.NONE, ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": (Cut.GATED, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": (Cut.COLUMNS, ("mlp.down_proj.weight",)),
    "mlp.router.weight": (Cut.NONE, ("mlp.gate.weight",)),
}
_EXPERT: dict[str, tuple[Cut, tuple[str, ...]]] = {
    "linear_fc1": (Cut.GATED, ("gate_proj.weight", "up_proj.weight")),
    "linear_fc2": (Cut.COLUMNS, ("down_proj.weight",)),
}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_NAME = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")


def weights_of(chunks: Sequence[Any], tied: bool) -> Iterator[Weight]:
    """Every parameter of this rank's pipeline chunks (each a GPTModel). With tied embeddings the last
    stage's copy is listed under the embedding's name, as its shadow."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _weight(name, parameter, chunk, tied)


def _weight(name: str, parameter: nn.Parameter, chunk: Any, tied: bool) -> Weight:
    if name in _OUTER:
        cut, hf_name = _OUTER[name]
        rank = {_EMBEDDING: -1, _FINAL_NORM: 10**6, _HEAD: 10**6 + 1}[hf_name]
        shadow = tied and hf_name == _HEAD
        return Weight(parameter, cut, (_EMBEDDING if shadow else hf_name,), (rank,), shadow)
    match = _LAYER_NAME.fullmatch(name)
    assert match, f"no Hugging Face name for {name}"
    layer = chunk.decoder.layers[int(match[1])].layer_number - 1
    prefix, rest = f"model.layers.{layer}.", match[2]
    if expert := _EXPERT_NAME.fullmatch(rest):
        cut, leaves = _EXPERT[expert[1]]
        names = tuple(f"{prefix}mlp.experts.{{expert}}.{leaf}" for leaf in leaves)
        index = int(expert[2])
        return Weight(
            parameter, cut, names, (layer, len(_LAYER), *_EXPERT_ORDER[expert[1]], index), expert=index
        )
    cut, leaves = _LAYER[rest]
    return Weight(parameter, cut, tuple(prefix + leaf for leaf in leaves), (layer, list(_LAYER).index(rest)))


_EXPERT_ORDER = {"linear_fc1": (0,), "linear_fc2": (1,)}
