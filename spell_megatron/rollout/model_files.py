"""What a Hugging Face model folder says about where a completion ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spell_megatron.rollout.engine import EngineError


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """Token ids that end a completion: `eos_token_id` of generation_config.json, else of config.json.

    Raises EngineError where neither gives one: the engine would always run to the token limit.
    """
    for file in (folder / "generation_config.json", folder / "config.json"):
        ids = _read(file).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise EngineError(f"{folder} names no eos_token_id in generation_config.json or config.json")


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read {file}: {error}") from None
