"""Where a model's config.json is: its own folder, or the architectures that this package knows by name."""

from __future__ import annotations

from pathlib import Path

from spell_megatron.types import SpellError

_KNOWN = Path(__file__).parent / "models"
_ASSETS = Path(__file__).parent.parent / "assets"


def architecture(path: str) -> Path:
    """A folder with the config.json of a model folder, of a shipped model, or of a known model of the hub."""
    name = path.rstrip("/").rpartition("/")[2]
    for folder in (Path(path).expanduser(), _ASSETS / path, _KNOWN / name):
        if path and (folder / "config.json").is_file():
            return folder
    raise SpellError(
        f"the planner does not know the sizes of {path!r}: it is no folder with a config.json, and none of"
        f" {', '.join(known())}; give a model folder (its config.json is enough)"
    )


def known() -> list[str]:
    """Names of the models that can be planned without a folder."""
    return sorted(path.parent.name for path in _KNOWN.glob("*/config.json"))
