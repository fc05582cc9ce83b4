"""What a rank of the trainer other than 0 does in a resync: its part of the stream, and of a transfer by every rank."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from spell_megatron.base.topology import LOCAL, Transfer
from spell_megatron.rollout import backend
from spell_megatron.rollout.transfer.manifest import Manifest

if TYPE_CHECKING:
    import torch

    from spell_megatron.rollout.transfer.local import LocalSender


class FollowerEngine:
    """Stands where rank 0 has its fleet; `model`, `scratch` and the way of weights are those of the fleet."""

    def __init__(self, model: Path, way: Transfer, *, scratch: Path) -> None:
        self._model, self._scratch, self._way = model, scratch, way

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Consume the stream, as `Fleet.update_weights` does at the same time; which version it is, rank 0 says."""
        if self._way in LOCAL:
            self._sender.send(weights)
        else:
            for _ in weights:
                pass

    def close(self) -> None:
        if "_sender" in vars(self):
            self._sender.close()

    @cached_property
    def _sender(self) -> LocalSender:
        """Made for the first transfer: it takes vLLM into this process."""
        backend.quiet()
        with backend.undisturbed(self._scratch):
            from spell_megatron.rollout.transfer.local import LocalSender

            return LocalSender(self._way, Manifest.of(self._model))
