"""The seed model before its first lesson: a small Qwen3 whose attention is already half wired.

Looking something up takes two steps of attention: a layer that tells every token what stood just
before it, and a later one that matches on that. From a plain random start the first step is found
only after thousands of updates. Here three heads of the first layer begin by looking one, two and
three tokens back; everything stays trainable.

A head that looks at a distance needs queries and keys that are the same for every token. Qwen3 has
no bias there, so all embeddings share one direction, and the query and key weights of these heads
read only it, through the rotary pairs that turn fastest.
"""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

HIDDEN, LAYERS, HEADS, HEAD_DIM, FFN = 128, 4, 4, 32, 384
ROPE_THETA = 10_000.0
_BACK = (1, 2, 3)
"""How far the wired heads look back."""
_PAIRS = 3
"""Rotary pairs that they use."""
_FIRST_GAIN, _GAIN = 2.0, 1.4
"""Start of the query and key norms' scales, in the first layer and above: attention begins sharp."""
_SHARED = 0.04
"""Length of the shared direction per square root of a dimension; an embedding's own part has 0.05."""


def newborn(vocabulary: int, eos: int, positions: int, seed: int) -> Qwen3ForCausalLM:
    """A fresh model with room for `vocabulary` tokens, float32; changes torch's random state."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-vocabulary // 64) * 64,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HEAD_DIM,
            intermediate_size=FFN,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            rope_theta=ROPE_THETA,
            eos_token_id=eos,
            bos_token_id=2,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        shared = torch.sign(torch.randn(HIDDEN))
        model.model.embed_tokens.weight.normal_(0, 0.05).add_(_SHARED * shared)
        for index, layer in enumerate(model.model.layers):
            for name, weight in layer.named_parameters():
                if weight.dim() == 2:
                    residual = "o_proj" in name or "down_proj" in name
                    weight.normal_(0, (0.5 if residual else 1.0) * weight.shape[1] ** -0.5)
            attention = layer.self_attn
            for norm in (attention.q_norm, attention.k_norm):
                norm.weight.fill_(_FIRST_GAIN if index == 0 else _GAIN)
        _look_back(model.model.layers[0].self_attn, shared / HIDDEN**0.5)
    return model


def _look_back(attention: torch.nn.Module, shared: torch.Tensor) -> None:
    """Wire one head for each distance of `_BACK`: its keys are its queries, turned by that many positions."""
    turn = ROPE_THETA ** (-2 * torch.arange(_PAIRS) / HEAD_DIM)
    for head, back in enumerate(_BACK):
        query, key = torch.zeros(HEAD_DIM), torch.zeros(HEAD_DIM)
        query[:_PAIRS] = 1.0
        key[:_PAIRS] = torch.cos(turn * back)
        key[HEAD_DIM // 2 : HEAD_DIM // 2 + _PAIRS] = torch.sin(turn * back)
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        for name, wired in (("q_proj", query), ("k_proj", key)):
            noise = 0.02 * HIDDEN**-0.5 * torch.randn(HEAD_DIM, HIDDEN)
            attention.get_parameter(f"{name}.weight")[rows] = wired[:, None] * shared + noise
