"""The trainer's weights on their way to engines elsewhere, kept for those that come back later.

A trainer streams its weights once, as a collective of all its ranks, and an engine may fail at any moment of it. So
the two are decoupled: the stream fills host memory on the trainer's thread, at its own pace, and transfers read it
from there on theirs, while it fills or later. A transfer that hangs holds up nobody, and an engine that is started
again in the middle of a step is given its weights while the ranks do something else.

On CUDA the memory is pinned and the copies are asynchronous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Condition

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.transfer.checksum import noted
from spell_megatron.rollout.transfer.manifest import Manifest


class WeightStore(WeightSource):
    """A `WeightSource` that one thread fills with a version at a time, and that others read any number of times.

    With `summed` it knows the checksums of what it keeps. A reader is given tensors on `device`.
    """

    def __init__(self, manifest: Manifest, device: torch.device, *, summed: bool = False) -> None:
        self._manifest = manifest
        self._device = device
        self._summed = summed
        self._kept: dict[str, torch.Tensor] = {}
        self._arrived: dict[str, torch.cuda.Event | None] = {}
        """What the version that fills has brought, in the stream's order."""
        self._known = False
        """Whether names, dtypes and shapes are those of a whole version."""
        self._fault: Exception | None = None
        self._changed = Condition()
        self.version: int | None = None
        """Version of the weights that are kept, once they are complete."""
        self.sums: dict[str, int] = {}
        """Checksums of the kept tensors, by name."""
        self.reached = ""
        """The last tensor that a reader was given: where a transfer is that does not end."""

    def begin(self) -> None:
        """Another version is to come: who reads from here on waits for it."""
        with self._changed:
            self.version, self._fault, self.reached = None, None, ""
            self._arrived = {}

    def fill(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Keep a whole stream. Raises what the stream raised; so does everybody who reads it."""
        stream = self._manifest.checked(weights)
        try:
            for name, tensor in noted(stream, self.sums) if self._summed else stream:
                copied = self._keep(name, tensor.detach())
                with self._changed:
                    self._arrived[name] = copied
                    self._changed.notify_all()
            for copied in self._arrived.values():
                if copied is not None:
                    copied.synchronize()  # the trainer may change its weights now
        except BaseException as fault:  # a Ctrl-C, too: who reads here waits on another thread
            stopped = EngineError(f"the weights broke off by {type(fault).__name__}")
            self._fault = fault if isinstance(fault, Exception) else stopped
            raise
        else:
            self.version, self._known = version, True
        finally:
            with self._changed:
                self._changed.notify_all()

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes in the stream's order, which does not change from version to version: after the
        first one they are known before it has arrived."""
        with self._changed:
            self._changed.wait_for(lambda: self._known or self._fault)
            self._raise_fault()
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._kept.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        names: list[str] = []
        while arrived := self._beyond(names):
            for name in arrived:
                self.reached = name
                if (copied := self._arrived[name]) is not None:
                    copied.synchronize()
                yield name, self._kept[name].to(self._device)
            names += arrived

    def _beyond(self, names: list[str]) -> list[str]:
        """Wait for what comes after `names`; nothing where they are all."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._arrived) > len(names) or self.version is not None or self._fault
            )
            self._raise_fault()
            return list(self._arrived)[len(names) :]

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _keep(self, name: str, tensor: torch.Tensor) -> torch.cuda.Event | None:
        """Copy a tensor to host memory; for a copy that is still under way, what says when it has arrived."""
        kept = self._kept.get(name)
        if kept is None or kept.dtype != tensor.dtype or kept.shape != tensor.shape:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[name] = kept
        kept.copy_(tensor, non_blocking=tensor.is_cuda)
        if not tensor.is_cuda:
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied
