"""Model folders of safetensors: slices read from them, shards written to them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spell_megatron.base.files import home_of_links
from spell_megatron.base.outputs import new_folder
from spell_megatron.types import SpellError
from spell_megatron.weights.contents import INDEX, Contents

_SHARD_BYTES = 4 << 30
_log = logging.getLogger(__name__)


class ModelFolder:
    """Reads parts of tensors, so that a rank loads only what it holds."""

    def __init__(self, contents: Contents) -> None:
        self.folder = contents.folder
        self._files = contents.files
        self._open: dict[Path, safe_open] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """Rows (and columns) of a tensor; only these are read from disk."""
        if name not in self._files:
            raise SpellError(
                f"{self.folder} lacks the tensor {name!r}: is it the folder of the configured model?"
            )
        path = self._files[name]
        try:
            handle = self._open.get(path)
            if handle is None:
                handle = self._open[path] = safe_open(path, framework="pt", device="cpu")
            whole = handle.get_slice(name)
            part: Tensor = whole[rows, columns] if columns is not None else whole[rows]
            return part
        except (SafetensorError, OSError) as error:
            raise SpellError(f"{path} is damaged at {name!r}: {error}; copy the model folder again") from None


def write_model(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    source: Path,
    config: Mapping[str, Any],
    write: bool,
) -> None:
    """Write a model folder: streamed `weights` as shards, `config` as config.json, all else copied from `source`.

    At most one shard is in memory. The folder appears under its name only when it is complete; one that is neither
    empty nor an earlier model of this function is refused with a SpellError. Ranks that do not write still consume
    the stream, whose items are collectives.
    """
    if not write:
        for _ in weights:
            pass
        return
    try:
        with new_folder(folder, "model") as partial:
            _copy_companions(source, partial, config)
            _write_shards(partial, weights)
    except OSError as error:
        raise SpellError(f"cannot write the model to {folder}: {error}") from None


def _copy_companions(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Config and tokenizer files; no weights, no half-written ones, and nothing of this machine that a link of a
    stranger's folder names."""
    home = home_of_links(source)
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix not in _COMPANIONS or path.name == INDEX:
            continue
        if (to := path.resolve()).is_relative_to(home) or _is_blob(to) or path.name == to.name in _TOKENIZER:
            shutil.copyfile(to, target / path.name)
        else:
            _log.warning("%s is a link to %s, outside of the model's folder: it is not copied", path, to)
    said = {key: value for key, value in config.items() if key != "torch_dtype"}
    (target / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


_COMPANIONS = (".json", ".jinja", ".txt", ".model")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *(
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    ),
)
"""What folders often link to those of their base model."""


def _is_blob(path: Path) -> bool:
    """Whether a file is of the hub's cache, which folders of older downloads link to."""
    return path.parent.name == "blobs" and (path.parent.parent / "snapshots").is_dir()


def _write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    shard: dict[str, Tensor] = {}
    files: list[Path] = []
    names: dict[str, int] = {}
    size = total = 0

    def flush() -> None:
        files.append(folder / f"model-{len(files) + 1:05d}.safetensors")
        save_file(shard, files[-1], metadata={"format": "pt"})
        shard.clear()

    for name, tensor in weights:
        tensor = tensor.detach().to("cpu").contiguous()
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor.clone()
        names[name] = len(files)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    final = [folder / f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for old, new in zip(files, final, strict=True):
        old.rename(new)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[file].name for name, file in names.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
