"""What a Hugging Face config.json says of a model's shape. No torch: the planner reads it too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.files import read_object
from spell_megatron.types import SpellError
from spell_megatron.weights.keys import FAMILIES, check_keys, number, rope


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder of one of the `FAMILIES`."""

    family: str
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

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.family].qkv_bias

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.family].qk_norm


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder."""
    try:
        return read_object(folder / "config.json")
    except FileNotFoundError:
        raise SpellError(
            f"{folder} is not a model folder: it has no config.json; give the folder of a Hugging Face model"
        ) from None


def model_shape(folder: Path) -> ModelShape:
    """The shape that config.json gives. Raises SpellError for any key that is not understood (`keys`)."""
    config, where = read_hf_config(folder), folder / "config.json"
    family = check_keys(config, folder)

    def size(key: str) -> int:
        return int(number(config, key, where, int))

    heads = size("num_attention_heads")
    experts = size("num_experts" if "num_experts" in config else "num_local_experts") if family.experts else 0
    shape = ModelShape(
        family=config["model_type"],
        vocab=size("vocab_size"),
        hidden=size("hidden_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=heads if config.get("num_key_value_heads", 0) is None else size("num_key_value_heads"),
        head_dim=size("head_dim")
        if "head_dim" in config
        else family.head_dim or size("hidden_size") // heads,
        ffn=size("intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=float(number(config, "rms_norm_eps", where, float)),
        max_positions=_positions(config, where),
        experts=experts,
        experts_per_token=size("num_experts_per_tok") if experts else 0,
        expert_ffn=size("moe_intermediate_size") if experts else 0,
        norm_topk=bool(config.get("norm_topk_prob", False)) if experts else True,
    )
    if shape.heads % shape.kv_heads or shape.experts_per_token > shape.experts:
        raise SpellError(
            f"{where}: {shape.heads} heads do not share {shape.kv_heads} key-value heads"
            if shape.heads % shape.kv_heads
            else f"{where}: num_experts_per_tok={shape.experts_per_token} is more than {shape.experts} experts"
        )
    return shape


def _positions(config: dict[str, Any], where: Path) -> int:
    """How many positions the model is meant for; a YaRN factor may reach beyond `max_position_embeddings`."""
    given, scaling = int(number(config, "max_position_embeddings", where, int)), rope(config)
    return max(
        given, int((scaling.get("factor") or 1) * (scaling.get("original_max_position_embeddings") or 0))
    )
