"""THE name table: which Hugging Face tensors a Megatron parameter holds, of which size, and how it is split. No torch.

Import, export, resync, the check of a model folder and the planner all read these rows, and nothing else knows a
weight's name or size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Literal

from spell_megatron.config.explaining import nearest
from spell_megatron.types import SpellError


class Split(Enum):
    """How a parameter lies over the tensor-parallel ranks."""

    REPLICATED = auto()
    """The same on every rank."""
    COLUMN = auto()
    """Column-parallel: dimension 0, the output features."""
    ROW = auto()
    """Row-parallel: dimension 1, the input features."""
    GATED = auto()
    """Gate over up projection, each column-parallel."""
    QKV = auto()
    """Per key-value head: its queries, its key, its value; the stack is column-parallel."""


Dimension = Literal["vocab", "hidden", "queries", "keys", "head", "ffn", "experts", "expert_ffn"]
"""A dimension of a tensor, by name: `queries` and `keys` are heads times the size of a `head`."""
Having = Literal["", "qkv_bias", "qk_norm", "dense", "experts", "untied"]
"""Which models have a row: all, or those with this."""


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of Megatron's GPTModel and the Hugging Face tensors that it is made of."""

    megatron: str
    """Its name; within its layer, where it is in one. Of experts without the expert's number."""
    names: tuple[str, ...]
    """Names of the tensors, with `{layer}` and `{expert}` for their numbers."""
    sizes: tuple[tuple[Dimension, ...], ...]
    """Sizes of each of the tensors."""
    split: Split
    having: Having = ""

    @property
    def layered(self) -> bool:
        """Every layer has one."""
        return "{layer}" in self.names[0]

    @property
    def expert(self) -> bool:
        """Every expert has one."""
        return "{expert}" in self.names[0]


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP, _EXPERT = f"{_LAYER}self_attn.", f"{_LAYER}mlp.", f"{_LAYER}mlp.experts.{{expert}}."
_SECOND_NORM = f"{_LAYER}post_attention_layernorm.weight"
_NORM: tuple[tuple[Dimension, ...], ...] = (("hidden",),)
_HEAD: tuple[tuple[Dimension, ...], ...] = (("head",),)

# fmt: off
ROWS: tuple[Row, ...] = (
    Row(EMBEDDING, ("model.embed_tokens.weight",), (("vocab", "hidden"),), Split.COLUMN),
    Row("self_attention.linear_qkv.layer_norm_weight", (f"{_LAYER}input_layernorm.weight",), _NORM, Split.REPLICATED),
    Row("self_attention.linear_qkv.weight", tuple(f"{_ATTENTION}{x}_proj.weight" for x in "qkv"),
        (("queries", "hidden"), ("keys", "hidden"), ("keys", "hidden")), Split.QKV),
    Row("self_attention.linear_qkv.bias", tuple(f"{_ATTENTION}{x}_proj.bias" for x in "qkv"),
        (("queries",), ("keys",), ("keys",)), Split.QKV, "qkv_bias"),
    Row("self_attention.q_layernorm.weight", (f"{_ATTENTION}q_norm.weight",), _HEAD, Split.REPLICATED, "qk_norm"),
    Row("self_attention.k_layernorm.weight", (f"{_ATTENTION}k_norm.weight",), _HEAD, Split.REPLICATED, "qk_norm"),
    Row("self_attention.linear_proj.weight", (f"{_ATTENTION}o_proj.weight",), (("hidden", "queries"),), Split.ROW),
    Row("mlp.linear_fc1.layer_norm_weight", (_SECOND_NORM,), _NORM, Split.REPLICATED, "dense"),
    Row("pre_mlp_layernorm.weight", (_SECOND_NORM,), _NORM, Split.REPLICATED, "experts"),
    Row("mlp.linear_fc1.weight", (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight"),
        (("ffn", "hidden"), ("ffn", "hidden")), Split.GATED, "dense"),
    Row("mlp.linear_fc2.weight", (f"{_MLP}down_proj.weight",), (("hidden", "ffn"),), Split.ROW, "dense"),
    Row("mlp.router.weight", (f"{_MLP}gate.weight",), (("experts", "hidden"),), Split.REPLICATED, "experts"),
    Row("mlp.experts.linear_fc1.weight", (f"{_EXPERT}gate_proj.weight", f"{_EXPERT}up_proj.weight"),
        (("expert_ffn", "hidden"), ("expert_ffn", "hidden")), Split.GATED, "experts"),
    Row("mlp.experts.linear_fc2.weight", (f"{_EXPERT}down_proj.weight",), (("hidden", "expert_ffn"),), Split.ROW,
        "experts"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), _NORM, Split.REPLICATED),
    Row(HEAD, ("lm_head.weight",), (("vocab", "hidden"),), Split.COLUMN, "untied"),
)
# fmt: on
"""The names that Llama brought and others took over, in the order in which weights are streamed."""


def named(names: Mapping[str, tuple[str, ...]]) -> tuple[Row, ...]:
    """The rows of these Megatron parameters under other Hugging Face names; a family leaves out what it does not have.

    Raises SpellError for a parameter that no row has, and where the number of tensors is another.
    """
    rows = {row.megatron: row for row in ROWS}
    for megatron, own in names.items():
        if megatron not in rows:
            raise SpellError(
                f"the name table has no parameter {megatron!r}{nearest(megatron, rows, cutoff=0.6)}"
            )
        if len(own) != len(rows[megatron].names):
            usual = ", ".join(rows[megatron].names)
            raise SpellError(
                f"{megatron} is made of {len(rows[megatron].names)} tensors ({usual}), not {len(own)}"
            )
    return tuple(replace(row, names=names[row.megatron]) for row in ROWS if row.megatron in names)
