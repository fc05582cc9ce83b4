"""The trainer's weights on their way to the engines, kept for engines that come back later.

A trainer streams its weights once, as a collective of all its ranks. An engine that dies in the middle of
a step needs them again while those ranks do something else, so a copy stays in host memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from spell_megatron.rollout.transfer.checksum import noted
from spell_megatron.rollout.transfer.manifest import Manifest


class WeightStore(WeightSource):
    """A `WeightSource` that streams the newest weights first, and repeats them from memory after that.

    With `summed` it knows the checksums of what it keeps.
    """

    def __init__(self, manifest: Manifest, device: torch.device, *, summed: bool = False) -> None:
        self._manifest = manifest
        self._device = device
        self._summed = summed
        self._kept: dict[str, torch.Tensor] = {}
        self._stream: Iterator[tuple[str, torch.Tensor]] | None = None
        self._fault: Exception | None = None
        self.version: int | None = None
        """Of the weights that are kept, once they are complete."""
        self.sums: dict[str, int] = {}
        """Checksums of the kept tensors, by name."""
        self.reached = ""
        """The last tensor that went out: where a transfer is that does not end."""

    def offer(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the next version's stream; whoever iterates first consumes it."""
        self.version, self._fault = None, None
        stream = self._manifest.checked(weights)
        self._stream = self._passing(noted(stream, self.sums) if self._summed else stream)

    def keep(self, version: int) -> None:
        """Consume what is left of the stream: the weights of `version` are complete from here on.

        Raises what the stream raised, if it did, now or while somebody iterated.
        """
        for _ in self._stream or ():
            pass
        self._stream = None
        if self._fault is not None:
            raise self._fault
        self.version = version

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes in the stream's order, which does not change from version to version."""
        if not self._kept:
            for _ in self._stream or ():
                pass
            self._stream = None
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._kept.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                # `yield from` would close the stream together with this iterator.
                for name, tensor in stream:
                    self.reached = name
                    yield name, tensor
            finally:
                self._stream = stream  # a transfer that stopped half way leaves the rest to `keep`
        else:
            for name, tensor in self._kept.items():
                self.reached = name
                yield name, tensor.to(self._device)

    def _passing(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            for name, tensor in weights:
                yield name, self._keep(name, tensor.detach()).to(self._device)
        except Exception as fault:
            self._fault = fault
            raise

    def _keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.dtype != tensor.dtype:
            self._kept[name] = tensor.to("cpu", copy=True)
        else:
            kept.copy_(tensor)
        return tensor
