"""Where a model's config.json is: its own folder, or the architectures that this package knows by name."""

from __future__ import annotations

from pathlib import Path

from spell_megatron.types import SpellError
from spell_megatron.weights.locate import local_folder

_KNOWN = Path(__file__).parent / "models"


def architecture(path: str) -> Path:
    """A folder with the config.json of a model folder, of a shipped model, or of a known model of the hub."""
    if (folder := local_folder(path)) is not None:
        return folder
    if (name := path.rstrip("/").rpartition("/")[2]) in known():
        return _KNOWN / name
    raise SpellError(
        f"the planner does not know the sizes of {path!r}: it is no folder with a config.json, and none of"
        f" {', '.join(known())}; give a model folder (its config.json is enough)"
    )


def known() -> list[str]:
    """Names of the models that can be planned without a folder."""
    return sorted(path.parent.name for path in _KNOWN.glob("*/config.json"))
