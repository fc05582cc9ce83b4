"""A model as engines and transformers know it: one of a family that they have no name for, as the one it is like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spell_megatron.base.files import hf_config
from spell_megatron.types import SpellError
from spell_megatron.weights.contents import read_contents
from spell_megatron.weights.families import Family
from spell_megatron.weights.files import ModelFolder, write_model
from spell_megatron.weights.keys import checked, read_config


def hugging_face_config(folder: Path, family: Family) -> PreTrainedConfig:
    """What transformers makes of a folder's config.json. Raises SpellError where it knows no such model."""
    values, kind = checked(hf_config(folder), folder / "config.json", family).values, family.known.name
    if kind not in CONFIG_MAPPING:
        raise SpellError(
            f"{folder}: transformers knows no model type {kind!r}: say of the family {family.title} which known one it"
            " is like"
        )
    return CONFIG_MAPPING[kind].from_dict({**values, "model_type": kind})


def known_folder(folder: Path, into: Path, families: Sequence[str] = ()) -> Path:
    """A folder that engines and transformers can load: the model's own, where they know its family.

    Otherwise the model is written to `into`, its weights and its config.json under the names of the family that it is
    like; tensors are read one by one. Raises SpellError where one of the two folders is not right.
    """
    if not read_config(folder, families).family.like:
        return folder
    contents = read_contents(folder, families)
    shape, source = contents.shape, ModelFolder(contents)
    known = replace(shape, family=shape.family.known)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for (name, _), (known_name, _) in zip(shape.tensors(), known.tensors(), strict=True):
            yield known_name, source.read(name)

    config = {
        **checked(hf_config(folder), folder / "config.json", shape.family).values,
        "model_type": known.family.name,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[known.family.name]],
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
    }
    write_model(into, weights(), source=folder, config=config, write=True)
    return into
