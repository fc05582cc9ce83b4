"""THE table of config.json: every key is read, harmless, or refused with the reason. No torch.

What a key says of the computation and nobody reads would make another model than the one in the folder, silently. So a
key that stands in no list here is refused, too, unless it switches something off: null, false, zero or empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spell_megatron.base.files import hf_config
from spell_megatron.types import SpellError
from spell_megatron.weights.families import Family, find

T = TypeVar("T", int, float)


# fmt: off
READ = frozenset((
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "intermediate_size", "tie_word_embeddings", "rms_norm_eps", "rope_theta",
    "max_position_embeddings", "rope_scaling", "rope_parameters", "dtype", "torch_dtype", "eos_token_id",
))
READ_OF_EXPERTS = frozenset(
    ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
)
WHY_HARMLESS = {
    "who made the file, and what it is called": (
        "architectures", "transformers_version", "_name_or_path", "name_or_path", "unsloth_version",
        "unsloth_fixed", "id2label", "label2id", "problem_type", "finetuning_task", "tokenizer_class",
    ),
    "asked of a library, not of the model": (
        "use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits",
        "torchscript", "is_encoder_decoder", "_attn_implementation", "attn_implementation", "pretraining_tp",
    ),
    "of training from the beginning: dropout and auxiliary losses are none of ours": (
        "initializer_range", "attention_dropout", "hidden_dropout", "router_aux_loss_coef",
    ),
    "of generation, which a recipe says": (
        "bos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "max_length",
    ),
    "read only with use_sliding_window, which is refused": ("sliding_window", "max_window_layers"),
}
# fmt: on
HARMLESS = frozenset(key for keys in WHY_HARMLESS.values() for key in keys)
_NEEDED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, 1.0),
    "decoder_sparse_step": (1,),
}
"""Keys of which one value alone is computed."""
REFUSED = {
    "quantization_config": "quantised weights are not trained: take the model's unquantised folder",
    "compression_config": "quantised weights are not trained: take the model's unquantised folder",
    "auto_map": "the folder brings code of its own, which is not run: take a model of a supported type, or remove"
    " the key where its computation is the family's own",
    "attention_bias": "biases of attention are computed for Qwen2.5 alone",
    "use_sliding_window": "sliding-window attention is not supported; set use_sliding_window to false",
    "dual_chunk_attention_config": "dual-chunk attention is not computed here; remove the key, or use rope_scaling",
    "mlp_only_layers": "models that mix dense and expert layers are not supported",
    "text_config": "it is a model of several modalities: take a text model's folder",
    "vision_config": "it is a model of several modalities: take a text model's folder",
    "num_nextn_predict_layers": "layers that predict further tokens are not trained",
}
"""Keys that change the computation, and what to do; harmless where they switch it off."""
# fmt: off
_ROPE = frozenset((
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor",
))
# fmt: on
_CHOSEN = frozenset(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
ROPE = ("default", "linear", "yarn", "llama3")
"""RoPE types whose angles depend on the position alone, not on the length of the sequence it stands in."""


@dataclass(frozen=True, slots=True)
class HfConfig:
    """A config.json, checked: nothing in it is computed wrongly, as far as its keys say."""

    path: Path
    family: Family
    values: Mapping[str, Any]
    """By the usual keys, with what the family implies."""

    def number(self, key: str, kind: type[T]) -> T:
        """A positive number. Raises SpellError where it is missing, or another thing."""
        return _number(self.values, key, self.path, kind, self._written(key))

    def size(self, key: str) -> int:
        return self.number(key, int)

    @property
    def rope(self) -> Mapping[str, Any]:
        """What it says of the rotary embedding's scaling, under either name."""
        given = self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}
        return given if isinstance(given, dict) else {}

    def _written(self, key: str) -> str:
        """As the family writes a usual key."""
        return next((own for own, usual in self.family.keys.items() if usual == key), key)


def read_config(folder: Path, families: Sequence[str] = ()) -> HfConfig:
    """The config.json of a model folder, of a family of ours or of `families` (import paths).

    Raises SpellError for the first key that would be computed wrongly.
    """
    given = hf_config(folder)
    try:
        family = find(given.get("model_type"), families)
    except SpellError as error:
        raise SpellError(f"{folder}: {error}") from None
    return checked(given, folder / "config.json", family)


def checked(given: Mapping[str, Any], where: Path, family: Family) -> HfConfig:
    """The values of a config.json as one of this family, as `read_config` reads it."""
    values: dict[str, Any] = {}
    for key, value in family.implied.items():
        _check_key(key, key, value, family, where)
    for written, value in given.items():
        key = family.keys.get(written, written)
        if key in values:
            raise SpellError(f"{where} says {key} under two names: keep one of them")
        _check_key(key, written, value, family, where)
        if written not in family.harmless:
            values[key] = value
    config = HfConfig(where, family, {**family.implied, **values})
    _check_rope(config)
    return config


def _check_key(key: str, written: str, value: Any, family: Family, where: Path) -> None:
    """`written` is how the family writes the usual `key`."""
    if written in family.refuses and value is not None:
        raise SpellError(
            f"{where}: {written}={value!r} changes what a {family.title} computes, which is not supported"
        )
    read = READ | (READ_OF_EXPERTS if family.experts else frozenset())
    harmless = HARMLESS | family.harmless
    if key in read or written in harmless or (key == "attention_bias" and family.qkv_bias):
        return
    if key == "layer_types":
        if value is not None and (
            not isinstance(value, list) or any(kind != "full_attention" for kind in value)
        ):
            raise SpellError(f"{where}: {written} other than full_attention are not supported: {value!r}")
    elif key in _NEEDED:
        if value not in _NEEDED[key] or isinstance(value, bool):
            raise SpellError(f"{where}: {written}={value!r} is not supported, only {_NEEDED[key][0]!r}")
    elif value:
        reason = REFUSED.get(key) or (
            "this key is unknown here, and may change what the model computes; if it does not, remove it from"
            " a copy of the folder"
        )
        raise SpellError(f"{where}: {written}: {reason}")


def _check_rope(config: HfConfig) -> None:
    values, where = config.values, config.path
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key) or {}, dict):
            raise SpellError(f"{where}: {key} is {values[key]!r}, expected an object or null")
    if values.get("rope_scaling") and values.get("rope_parameters"):
        raise SpellError(f"{where} has both rope_scaling and rope_parameters: keep one of them")
    given = config.rope
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE:
        raise SpellError(
            f"{where.parent}: RoPE scaling of type {kind!r} is not supported; supported: {', '.join(ROPE)}."
            " For long documents set rope_scaling in config.json to"
            ' {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}'
        )
    if given.get("type", kind) != kind:
        raise SpellError(f"{where}: rope_type is {kind!r} and type {given['type']!r}: keep one of them")
    for key, value in given.items():
        if key == "partial_rotary_factor" and value == 1:
            continue
        if key not in _ROPE:
            raise SpellError(f"{where}: {key}={value!r} of the RoPE scaling is not known; remove it")
        if key in _CHOSEN and value is None:  # the same as not given
            continue
        if key not in ("rope_type", "type", "truncate"):
            _number(given, key, where, float, key)


def _number(values: Mapping[str, Any], key: str, where: Path, kind: type[T], written: str) -> T:
    if key not in values:
        raise SpellError(f"{where} lacks {written!r}")
    value = values[key]
    fits = isinstance(value, int) or (kind is float and isinstance(value, float))
    if not fits or isinstance(value, bool) or not 0 < value < 1e18:
        what = "a whole number" if kind is int else "a number"
        raise SpellError(f"{where}: {written} is {value!r}, expected {what} between 0 and 1e18")
    return kind(value)
