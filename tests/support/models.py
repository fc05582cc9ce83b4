"""Tiny Hugging Face models with everything in them that a converter can get wrong.

Biases and norm weights are random (an initial zero or one hides a mistake), and the initial spread is
wide enough that log-probabilities differ visibly between two seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

Kind = Literal["qwen3", "qwen3_tied", "qwen2", "moe", "llama", "llama_tied", "mistral"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_MADE: dict[Kind, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, {}),
    "qwen3_tied": (Qwen3ForCausalLM, _TIED),
    "qwen2": (Qwen2ForCausalLM, {"hidden_size": 128}),  # its heads are hidden_size / num_attention_heads wide
    "moe": (Qwen3MoeForCausalLM, _EXPERTS),
    "llama": (LlamaForCausalLM, {}),
    "llama_tied": (LlamaForCausalLM, _TIED),
    "mistral": (MistralForCausalLM, {"sliding_window": None}),
}
"""The class of each kind, and what differs from `_SHAPE`."""


def make_config(kind: Kind, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a tiny model; head_dim is 32 in every kind."""
    maker, own = _MADE[kind]
    width = {} if kind == "qwen2" else {"head_dim": 32}
    shape = {**_SHAPE, **width, "tie_word_embeddings": False, **own, **overrides}
    return maker.config_class(**shape)


def build_model(kind: Kind, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model in memory, from a seed; the global random state is left as it was."""
    config = make_config(kind, **overrides)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MADE[kind][0](config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0.0, 0.2)
                elif "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_model(kind: Kind, folder: Path | str, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model as a Hugging Face folder (no tokenizer) and return the folder.

    `overrides` are fields of the Hugging Face configuration, `vocab_size=512` for instance.
    """
    folder = Path(folder)
    model = build_model(kind, seed, **overrides)
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    model.save_pretrained(folder)
    return folder
