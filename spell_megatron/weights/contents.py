"""What is in a model folder, held against what its config.json promises, before anything is made of it.

Every reader of a model begins here: training, conversions, parity, engines, launchers. Only headers are read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spell_megatron.base.files import read_object
from spell_megatron.types import SpellError
from spell_megatron.weights.shape import ModelShape, Sizes, model_shape
from spell_megatron.weights.table import EMBEDDING

_log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Tensors that are computed from config.json, and stand in some folders besides."""
_DTYPES = ("F32", "BF16", "F16", "F64")
_KINDS = (
    (r"scale|qweight|qzeros|g_idx|absmax|quant", "scales of quantised weights"),
    (r"visual|vision|audio|projector", "another modality's tower"),
    (r"lora_|adapter", "an adapter: merge it into the model first"),
    (r"v_head|value_head|score\.|summary", "a value or reward head"),
    (r"mtp|nextn|eh_proj", "layers that predict further tokens"),
    (r"layers\.\d+\.", "layers or parts of layers that config.json does not name"),
)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Contents:
    """A model folder whose tensors are those of its shape."""

    folder: Path
    shape: ModelShape
    """With embedding and head untied where the folder has two that differ."""
    files: Mapping[str, Path]
    """Where each of the model's tensors is."""
    sizes: Mapping[str, Sizes]
    """And its size."""


def read_contents(folder: Path, families: Sequence[str] = ()) -> Contents:
    """Read and check a model folder; `families` are import paths of a user's own.

    Raises SpellError for whatever would be loaded wrongly, or not at all.
    """
    shape = model_shape(folder, families)
    head, embedding = shape.family.head, "".join(shape.family.names(EMBEDDING))
    _check_tokenizer(folder, shape)
    found = _headers(folder)
    if shape.tied and head in found and not _equal(found, head, embedding):
        shape = replace(shape, tied=False)
        _log.warning(
            "%s: tie_word_embeddings is true, and %s differs from the embedding: they are not tied",
            folder,
            head,
        )
    wanted = dict(shape.tensors())
    extra = sorted(name for name in found.keys() - wanted.keys() if not (shape.tied and name == head))
    derived = [name for name in extra if _DERIVED.fullmatch(name)]
    if derived:
        _log.info("%s: %d derived tensors are not read: %s", folder, len(derived), derived[0])
    _refuse_extra(folder, [name for name in extra if name not in derived])
    for name, sizes in wanted.items():
        if name not in found:
            raise SpellError(f"{folder} lacks the tensor {name!r}: is it the folder of the configured model?")
        path, given, dtype = found[name]
        if dtype not in _DTYPES:
            raise SpellError(f"{path}: {name!r} holds {dtype} numbers; quantised weights are not trained")
        if given != sizes:
            raise SpellError(
                f"{path}: {name!r} has the shape {list(given)}, and by config.json it is {list(sizes)}: one of the"
                " two belongs to another model; copy the model folder again"
            )
    return Contents(
        folder, shape, {name: found[name][0] for name in wanted}, {name: found[name][1] for name in wanted}
    )


def shape_of(folder: Path, families: Sequence[str] = ()) -> ModelShape:
    """The shape of a model folder, checked; of one without weights what config.json says."""
    if any(folder.glob("*.safetensors")):
        return read_contents(folder, families).shape
    return model_shape(folder, families)


def _files(folder: Path) -> list[Path]:
    """The files of weights: where there is an index, those that it names. Mistral's folders hold the same weights once
    more, in `consolidated.safetensors`. `model.safetensors` is refused there, since transformers reads it first."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SpellError(f"{folder} has no *.safetensors: convert the model to safetensors first")
    path = folder / INDEX
    if not path.exists():
        return files
    named = read_object(path).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise SpellError(f"{path} has no weight_map of file names; copy the folder again")
    there = {file.name for file in files}
    if missing := sorted(set(named.values()) - there):
        raise SpellError(
            f"{path} names {missing[0]!r}, which is not in the folder; copy that file, or remove the index where the"
            " weights are in other files"
        )
    others = sorted(there - set(named.values()))
    if _SINGLE in others:
        raise SpellError(
            f"{folder} holds two sets of weights: {_SINGLE} and those of {INDEX}; keep one of them"
        )
    if others:
        _log.info("%s: not in the index, and so not read: %s", folder, ", ".join(others))
    return [file for file in files if file.name not in others]


def _headers(folder: Path) -> dict[str, tuple[Path, Sizes, str]]:
    """File, size and number format of every tensor in the folder's files of weights; a tensor is in one file."""
    files = _files(folder)
    found: dict[str, tuple[Path, Sizes, str]] = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                    if name in found:
                        raise SpellError(
                            f"{folder} holds two sets of weights: {name!r} is in {found[name][0].name} and in"
                            f" {path.name}; keep one of them"
                        )
                    part = tensors.get_slice(name)
                    found[name] = path, tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise SpellError(f"cannot read the weights in {path}: {error}; copy the folder again") from None
    return found


def _refuse_extra(folder: Path, names: list[str]) -> None:
    if not names:
        return
    what = next((what for pattern, what in _KINDS if re.search(pattern, names[0])), "no part of this model")
    shown = ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
    raise SpellError(
        f"{folder} holds {len(names)} tensors that the model of its config.json does not have ({what}): {shown}."
        " Take the folder of the plain text model, or remove them from a copy"
    )


def _equal(found: Mapping[str, tuple[Path, Sizes, str]], head: str, embedding: str) -> bool:
    """Whether the head is the embedding, bit by bit."""
    if embedding not in found or found[head][1:] != found[embedding][1:]:
        return False
    import torch  # bfloat16 has no numpy type

    path, size, _ = found[head]
    try:
        with safe_open(path, framework="pt") as one, safe_open(found[embedding][0], framework="pt") as other:
            left, right = one.get_slice(head), other.get_slice(embedding)
            rows = range(0, size[0], 4096)
            return all(torch.equal(left[row : row + 4096], right[row : row + 4096]) for row in rows)
    except SafetensorError as error:
        raise SpellError(f"{path} is damaged at {head!r}: {error}; copy the model folder again") from None


def _check_tokenizer(folder: Path, shape: ModelShape) -> None:
    """Its ids are rows of the embedding; generation settings, which say where a completion ends, can be read."""
    if (folder / "generation_config.json").is_file():
        read_object(folder / "generation_config.json")
    if not (folder / "tokenizer.json").is_file():
        return
    tokenizer = read_object(folder / "tokenizer.json")
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = [token.get("id") for token in (added if isinstance(added, list) else ()) if isinstance(token, dict)]
    if isinstance(vocab, dict | list):
        ids += vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
    largest = max((token for token in ids if isinstance(token, int)), default=-1)
    if largest >= shape.vocab:
        raise SpellError(
            f"{folder}: the tokenizer has the id {largest}, and the embedding {shape.vocab} rows: they belong to"
            " different models, or tokens were added and the embedding not resized"
        )
