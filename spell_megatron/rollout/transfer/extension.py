"""Loaded by every vLLM worker (`--worker-extension-cls`): makes our transfer backends known to it, and lets
the trainer ask which weights it was given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from spell_megatron.rollout.transfer import gloo, shm
from spell_megatron.rollout.transfer.checksum import noted

gloo.register()
shm.register()


class Extension:
    """Methods of the worker, called over `/collective_rpc`.

    Every backend ends in the model's `load_weights`, with whole tensors under Hugging Face names. Behind it
    they are fused, cut and packed beyond recognition, on a CPU even dropped: this is the last place where
    they can be compared with what the trainer sent.
    """

    _given_weights: dict[str, int]

    def watch_weights(self) -> None:
        """From here on, keep the checksums of what is loaded."""
        model: Any = self.get_model()  # type: ignore[attr-defined]  # the worker's own
        sums: dict[str, int] = {}
        self._given_weights = sums
        load = type(model).load_weights

        def load_and_note(weights: Iterable[tuple[str, torch.Tensor]], *rest: Any, **named: Any) -> Any:
            return load(model, noted(weights, sums), *rest, **named)

        model.load_weights = load_and_note

    def given_weights(self) -> dict[str, int]:
        """Checksums by tensor name since `watch_weights`; stops watching."""
        vars(self.get_model()).pop("load_weights", None)  # type: ignore[attr-defined]
        return self._given_weights
