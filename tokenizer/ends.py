"""Where a model folder says that a completion ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spell_megatron.base.files import read_object
from spell_megatron.types import SpellError


def end_tokens(folder: Path, own: Iterable[int | None] = ()) -> tuple[int, ...]:
    """Token ids that end a completion: the tokenizer's `own`, and `eos_token_id` of generation_config.json, or of
    config.json where that has none (Llama and Qwen name several).

    Raises SpellError where there is none: an engine would always run to the token limit.
    """
    ids = list(own)
    for file in (folder / "generation_config.json", folder / "config.json"):
        named = read_object(file).get("eos_token_id") if file.is_file() else None
        if named is not None:
            listed = named if isinstance(named, list) else [named]
            if not all(type(token) is int and token >= 0 for token in listed if token is not None):
                raise SpellError(f"{file}: eos_token_id is {named!r}, where token ids belong")
            ids += listed
            break
    found = tuple(dict.fromkeys(token for token in ids if token is not None))
    if not found:
        raise SpellError(
            f"{folder} names no eos_token_id in generation_config.json or config.json: add the id of the token that"
            " ends an answer"
        )
    return found
