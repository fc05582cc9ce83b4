"""Where a model's folder is: given, shipped with the package, or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from spell_megatron.types import SpellError

_SHIPPED = Path(__file__).parent / "assets"
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_SECOND_SETS = ["consolidated*"]
"""The same weights once more, under names of the model's maker."""


def local_folder(path: str) -> Path | None:
    """The folder of a model that is on this machine under its path, or shipped; None where it is not."""
    folders = (Path(path).expanduser(), _SHIPPED / path) if path else ()
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def model_folder(path: str) -> Path:
    """The local folder of a model: a path, the name of a shipped model, or a hub id (which is downloaded).

    Only safetensors are taken from the hub, never pickled weights.
    """
    if not path:
        raise SpellError(
            "model.path is empty: give a Hugging Face model folder, or a hub id such as Qwen/Qwen3-4B"
        )
    if (folder := local_folder(path)) is not None:
        return folder
    if Path(path).expanduser().exists() or path.count("/") != 1:
        raise SpellError(f"{path} is not a model folder: it has no config.json (model.path)")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, allow_patterns=_FILES, ignore_patterns=_SECOND_SETS))
    except Exception as error:  # the hub's client raises many kinds
        raise SpellError(
            f"no folder {path}, and the hub does not give it ({type(error).__name__}): on a machine"
            " without network copy the model folder there and set model.path to it"
        ) from None
