"""What a Hugging Face config.json says of a model's shape. No torch: the planner reads it too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.types import SpellError

ROPE = ("default", "linear", "yarn", "llama3")
"""RoPE types whose angles depend on the position alone, not on the length of the sequence it stands in."""
FAMILIES = {"qwen2": "Qwen2.5", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE"}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a Qwen2.5, Qwen3 or Qwen3-MoE decoder."""

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
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family != "qwen2"


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpellError(
            f"{folder} is not a model folder: it has no config.json; give the folder of a Hugging Face model"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SpellError(f"cannot read {path}: {error}; copy the model folder again") from None
    if not isinstance(config, dict):
        raise SpellError(f"{path} holds {type(config).__name__}, expected a JSON object")
    return config


def model_shape(folder: Path) -> ModelShape:
    config = read_hf_config(folder)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise SpellError(
            f"{folder}: model type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    moe = family == "qwen3_moe"
    if moe and (config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers")):
        raise SpellError(f"{folder}: models that mix dense and expert layers are not supported")
    if config.get("use_sliding_window"):
        raise SpellError(
            f"{folder}: sliding-window attention is not supported; set use_sliding_window to false"
        )
    try:
        return ModelShape(
            family=family,
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            ffn=config["intermediate_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            norm_eps=config["rms_norm_eps"],
            max_positions=_positions(config, folder),
            experts=config.get("num_experts", config.get("num_local_experts", 0)) if moe else 0,
            experts_per_token=config["num_experts_per_tok"] if moe else 0,
            expert_ffn=config["moe_intermediate_size"] if moe else 0,
            norm_topk=bool(config.get("norm_topk_prob", False)) if moe else True,
        )
    except KeyError as missing:
        raise SpellError(f"{folder / 'config.json'} lacks {missing}") from None


def _positions(config: dict[str, Any], folder: Path) -> int:
    """How many positions the model is meant for; a YaRN factor may reach beyond `max_position_embeddings`."""
    given = config["max_position_embeddings"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE:
        raise SpellError(
            f"{folder}: RoPE scaling of type {kind!r} is not supported; supported: {', '.join(ROPE)}."
            " For long documents set rope_scaling in config.json to"
            ' {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}'
        )
    return max(given, int(rope.get("factor", 1.0) * rope.get("original_max_position_embeddings", 0)))
