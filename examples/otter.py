"""A family of models whose config.json and weights have names of their own, without a change to the core.

Otter computes what Qwen3 does and calls everything otherwise:

    PYTHONPATH=examples spell-megatron parity OTTER_FOLDER --family otter:OTTER

vLLM and transformers know no Otter. They are given a copy of the model under the names of the family that it is `like`,
and so are the weights of every resync; what a run exports is an Otter again.
"""

from __future__ import annotations

from spell_megatron.weights.families import Family
from spell_megatron.weights.table import named

_BLOCK = "blocks.{layer}."

OTTER = Family(
    name="otter",
    title="Otter",
    like="qwen3",
    qk_norm=True,
    keys={
        "n_vocab": "vocab_size",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_width": "head_dim",
        "mlp_width": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "context": "max_position_embeddings",
        "rope_base": "rope_theta",
        "tied": "tie_word_embeddings",
    },
    harmless=frozenset(("made_in",)),
    rows=named(
        {
            "embedding.word_embeddings.weight": ("tokens.weight",),
            "self_attention.linear_qkv.layer_norm_weight": (f"{_BLOCK}attn.norm.weight",),
            "self_attention.linear_qkv.weight": tuple(f"{_BLOCK}attn.w{x}.weight" for x in "qkv"),
            "self_attention.q_layernorm.weight": (f"{_BLOCK}attn.norm_q.weight",),
            "self_attention.k_layernorm.weight": (f"{_BLOCK}attn.norm_k.weight",),
            "self_attention.linear_proj.weight": (f"{_BLOCK}attn.wo.weight",),
            "mlp.linear_fc1.layer_norm_weight": (f"{_BLOCK}mlp.norm.weight",),
            "mlp.linear_fc1.weight": (f"{_BLOCK}mlp.gate.weight", f"{_BLOCK}mlp.up.weight"),
            "mlp.linear_fc2.weight": (f"{_BLOCK}mlp.down.weight",),
            "decoder.final_layernorm.weight": ("norm.weight",),
            "output_layer.weight": ("logits.weight",),
        }
    ),
)
