"""Plain values of a checkpoint are saved as a pickled object among its tensors.

Since 0.19 `dist_checkpointing.save` puts what is no tensor (steps, rates) into one object of the distributed
files (serialization.py:439), which only a full unpickler reads. Here they go to `common.pt`, as before: upstream
still prefers that file where it finds it (serialization.py:224).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from megatron_patches.patch import Patch

_KEY = "common_state"


def _needed() -> bool:
    from megatron.core.dist_checkpointing import serialization

    return hasattr(serialization, "_legacy_common_state_exists")


def _apply() -> None:
    from megatron.core.dist_checkpointing.strategies.common import save_common
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    original = TorchDistSaveShardedStrategy.async_save

    @functools.wraps(original)
    def async_save(
        self: Any, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *args: Any, **kwargs: Any
    ) -> Any:
        values = sharded_state_dict.pop(_KEY, None)
        if values is not None:
            save_common(values.data, checkpoint_dir)  # rank 0 writes
        return original(self, sharded_state_dict, checkpoint_dir, *args, **kwargs)

    TorchDistSaveShardedStrategy.async_save = async_save


PATCH = Patch(
    name="common_values",
    scope="any",
    upstream="megatron/core/dist_checkpointing/serialization.py:439",
    breaks="checkpoints that cannot be read without running what their files say",
    needed=_needed,
    apply=_apply,
    versions=("0.19.2",),
)
