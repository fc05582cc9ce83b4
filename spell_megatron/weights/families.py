"""The families of models that can be trained, one record each; a user's own by its import path. No torch.

A family is what a `model_type` says by itself, and config.json does not. Whoever reads a model reads its family: the
keys of config.json, the name table, Megatron's layers, the planner. Its layer is the same in all of them: RMSNorm,
attention with RoPE, SwiGLU, and experts in the place of the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spell_megatron.base.registry import Registry
from spell_megatron.types import SpellError
from spell_megatron.weights.table import HEAD, ROWS, Having, Row

KEY = "model.families"


@dataclass(frozen=True, slots=True)
class Family:
    """See the module's docstring."""

    name: str
    """Its `model_type` in config.json."""
    title: str
    """As people call it."""
    qkv_bias: bool = False
    """Queries, keys and values have biases."""
    qk_norm: bool = False
    """Each head's queries and keys are normed."""
    experts: bool = False
    """Every MLP is a mixture of experts."""
    rows: tuple[Row, ...] = ROWS
    """Its name table; `table.named` gives other names to the usual rows."""
    keys: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Its own keys of config.json, with the usual ones that they stand for: `{"n_embd": "hidden_size"}`."""
    implied: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Values of usual keys where config.json gives none."""
    harmless: frozenset[str] = frozenset()
    """Its own keys that change nothing in what is computed here."""
    refuses: frozenset[str] = frozenset()
    """Keys that change this family's computation, and are harmless in the others."""
    like: str = ""
    """The name of a shipped family that computes the same, for engines and transformers that know this one by no name;
    empty where they know it."""

    @property
    def having(self) -> frozenset[Having]:
        """Which rows its models may have."""
        flags: dict[Having, bool] = {
            "": True,
            "untied": True,
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
            "experts": self.experts,
            "dense": not self.experts,
        }
        return frozenset(having for having, there in flags.items() if there)

    @property
    def known(self) -> Family:
        """Itself, or the family as which engines and transformers know it."""
        return FAMILIES[self.like] if self.like else self

    def names(self, megatron: str) -> tuple[str, ...]:
        """The Hugging Face tensors of a parameter of Megatron's; () where it has no such row."""
        return next((row.names for row in self.rows if row.megatron == megatron), ())

    @property
    def head(self) -> str:
        """The tensor that makes logits."""
        return "".join(self.names(HEAD))


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("qwen2", "Qwen2.5", qkv_bias=True),
        Family("qwen3", "Qwen3", qk_norm=True, implied={"head_dim": 128}),
        Family("qwen3_moe", "Qwen3-MoE", qk_norm=True, experts=True),
        Family("llama", "Llama"),
        Family("mistral", "Mistral", refuses=frozenset(("sliding_window",))),
    )
}


def find(model_type: object, own: Sequence[str] = ()) -> Family:
    """The family of a `model_type`: a shipped one, or one of `own`, by import path. SpellError where there is none."""
    families = Registry("family of models", Family, FAMILIES.values())
    for path in own:
        if fault := _fault(families.find(path, KEY)):
            raise SpellError(f"{KEY}: {path!r} {fault}")
    if not isinstance(model_type, str) or model_type not in families:
        raise SpellError(
            f"model type {model_type!r} is not supported; supported: {', '.join(families)}. A family of your own is"
            f" named by its import path, as {KEY}=[my_package.families:MINE]"
        )
    return families[model_type]


def _fault(family: Family) -> str:
    """Why this is no family; empty where it is one."""
    if family.like and (family.like not in FAMILIES or family.known.having != family.having):
        return (
            f"is like {family.like!r}, which is none of the families that compute the same: "
            f"{', '.join(name for name, known in FAMILIES.items() if known.having == family.having)}"
        )
    for row in ROWS:
        if row.having in family.having and not family.names(row.megatron):
            return f"has no row for {row.megatron} in its name table, which its models have"
    return ""
