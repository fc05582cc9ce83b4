"""A configuration with something changed: the size of its cluster, or any key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from spell_megatron.config import Config
from spell_megatron.types import SpellError

_Section = TypeVar("_Section")


def resized(config: Config, gpus: int | None, gpu_memory_gib: float | None) -> Config:
    """The same recipe on another number of GPUs, of another size."""
    cluster = config.cluster
    if gpus is not None:
        per_node = min(gpus, cluster.gpus_per_node)
        if gpus < 1 or gpus % per_node:
            raise SpellError(
                f"{gpus} GPUs do not fill nodes of {per_node}: give a multiple, or set cluster.gpus_per_node"
            )
        cluster = replace(cluster, nodes=gpus // per_node, gpus_per_node=per_node)
    if gpu_memory_gib is not None:
        cluster = replace(cluster, gpu_memory_gib=gpu_memory_gib)
    return replace(config, cluster=cluster)


def changed(config: _Section, changes: dict[str, Any]) -> _Section:
    """A configuration with some dotted keys replaced."""
    for key, value in changes.items():
        config = _changed(config, key.split("."), value)
    return config


def _changed(section: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _changed(getattr(section, path[0]), path[1:], value)
    return replace(section, **{path[0]: inner})
