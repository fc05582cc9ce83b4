"""The seed model before its first lesson: a small Qwen3 whose attention is already half wired.

Looking something up takes two steps of attention: a layer that tells every token what stood just
before it, and a later one that matches on that. From a plain random start the first step is found
only after thousands of updates. Here a few heads of the first layer begin by looking one, two and
more tokens back; everything stays trainable.

A larger world, whose subjects have two words each, wants more than that: there the second step is wired as well. Heads
of the second layer begin by attending to where the same few tokens stood before, and repeat what came after them.

A head that looks at a distance needs queries and keys that are the same for every token. Qwen3 has
no bias there, so all embeddings share one direction, and the query and key weights of these heads
read only it, through the rotary pairs that turn fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

_PAIRS = 3
"""Rotary pairs that the wired heads use."""
_FIRST_GAIN, _GAIN = 2.0, 1.4
"""Start of the query and key norms' scales, in the first layer and above: attention begins sharp."""
_SHARED = 0.04
"""Length of the shared direction per square root of a dimension; an embedding's own part has 0.05."""
_QUIET = 0.1
"""What is not wired begins by saying so much less, lest it drown what is."""
_WRITTEN, _COPIED = 0.3, 1.0
"""How strongly a wired head writes what it sees; an embedding has the length 0.9, a head's value about 5."""


@dataclass(frozen=True)
class Shape:
    """How large the model is."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    ffn: int = 384
    back: tuple[int, ...] = (1, 2, 3)
    """How far the wired heads of the first layer look back, one head each."""
    repeat: int = 0
    """Heads of the second layer that begin by repeating: at most two."""
    rope_theta: float = 10_000.0


def untaught(vocabulary: int, eos: int, positions: int, seed: int, shape: Shape) -> Qwen3ForCausalLM:
    """A fresh model with room for `vocabulary` tokens, float32; changes torch's random state."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-vocabulary // 64) * 64,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.ffn,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            rope_theta=shape.rope_theta,
            eos_token_id=eos,
            bos_token_id=2,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        shared = torch.sign(torch.randn(shape.hidden))
        model.model.embed_tokens.weight.normal_(0, 0.05).add_(_SHARED * shared)
        for index, layer in enumerate(model.model.layers):
            for name, weight in layer.named_parameters():
                if weight.dim() == 2:
                    residual = "o_proj" in name or "down_proj" in name
                    weight.normal_(0, (0.5 if residual else 1.0) * weight.shape[1] ** -0.5)
            attention = layer.self_attn
            for norm in (attention.q_norm, attention.k_norm):
                norm.weight.fill_(_FIRST_GAIN if index == 0 else _GAIN)
        _look_back(model.model.layers[0].self_attn, shared / shape.hidden**0.5, shape)
        if shape.repeat:
            _repeat(list(model.model.layers), shared / shape.hidden**0.5, shape)
    return model


def _look_back(attention: torch.nn.Module, shared: torch.Tensor, shape: Shape) -> None:
    """Wire one head for each distance of `shape.back`: its keys are its queries, turned by that many positions."""
    size, hidden = shape.head_dim, shape.hidden
    turn = shape.rope_theta ** (-2 * torch.arange(_PAIRS) / size)
    for head, back in enumerate(shape.back):
        query, key = torch.zeros(size), torch.zeros(size)
        query[:_PAIRS] = 1.0
        key[:_PAIRS] = torch.cos(turn * back)
        key[size // 2 : size // 2 + _PAIRS] = torch.sin(turn * back)
        rows = slice(head * size, (head + 1) * size)
        for name, wired in (("q_proj", query), ("k_proj", key)):
            noise = 0.02 * hidden**-0.5 * torch.randn(size, hidden)
            attention.get_parameter(f"{name}.weight")[rows] = wired[:, None] * shared + noise


def _repeat(layers: Sequence[Qwen3DecoderLayer], shared: torch.Tensor, shape: Shape) -> None:
    """Wire heads of the second layer to match the last tokens with those before an earlier place, and copy that one.

    Each of the first layer's wired heads writes a part of the token that it sees into dimensions of its own. There the
    second layer finds, at an earlier place, what stood one, two, … tokens before it, and compares it with the present
    token, the one before, …: through the rotary pairs that hardly turn over a cluster's length.
    """
    size, hidden, depth = shape.head_dim, shape.hidden, len(shape.back) - 1
    basis = torch.linalg.qr(torch.cat([shared[:, None], torch.randn(hidden, hidden - 1)], dim=1))[0].T[1:]
    seen, *written, rest = basis[: (len(shape.back) + 2) * size].split(size)
    first, second = layers[0], layers[1]
    for layer in layers:
        layer.mlp.down_proj.weight.mul_(_QUIET)
        layer.self_attn.o_proj.weight.mul_(_QUIET)
    for head, into in enumerate(written):
        rows = slice(head * size, (head + 1) * size)
        first.self_attn.v_proj.weight[rows] = seen
        first.self_attn.o_proj.weight[:, rows] = _WRITTEN * into.T
    slow = size // 2 - size // 4
    places = torch.cat([torch.arange(slow, size // 2), torch.arange(size // 2 + slow, size)])
    attention = second.self_attn
    for head, copied in zip(range(shape.repeat), (seen, rest), strict=False):
        rows = slice(head * size, (head + 1) * size)
        query, key = torch.zeros(size, hidden), torch.zeros(size, hidden)
        for back, chosen in enumerate(places.chunk(depth)):
            mixed = torch.randn(len(chosen), size) * size**-0.5
            query[chosen] = mixed @ (written[back - 1] if back else seen)
            key[chosen] = mixed @ written[back]
        attention.q_proj.weight[rows], attention.k_proj.weight[rows] = query, key
        rows = slice(head * size, head * size + len(copied))
        attention.v_proj.weight[rows], attention.o_proj.weight[:, rows] = copied, _COPIED * copied.T
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.fill_(_FIRST_GAIN)
