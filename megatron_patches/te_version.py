"""Asking whether Transformer Engine is recent enough raises where it is not installed at all.

`get_te_version()` is None then, and None is compared with a version (utils.py:348). Nothing is as old as what is
missing. Upstream asks so when the optimizer is offloaded, which does not need Transformer Engine.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron_patches.patch import Patch


def _utils() -> Any:
    from megatron.core import utils

    return utils


def _needed() -> bool:
    try:
        _utils().is_te_min_version("0")
    except TypeError:
        return True
    return False


def _apply() -> None:
    from packaging.version import Version

    original = _utils().get_te_version

    @functools.wraps(original)
    def get_te_version() -> Any:
        return original() or Version("0.dev0")

    _utils().get_te_version = get_te_version


PATCH = Patch(
    name="te_version",
    scope="any",
    upstream="megatron/core/utils.py:348; optimizer/optimizer_config.py:383",
    breaks="TypeError where optimizer state is offloaded, without Transformer Engine",
    needed=_needed,
    apply=_apply,
    layers="torch",
    versions=("0.16.1",),
)
