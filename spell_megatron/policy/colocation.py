"""A learner's tensors, moved to host memory while somebody else needs the device.

The bytes go, the tensors stay: a storage is emptied and later filled again, so that every view of it (a
parameter in its buffer, a gradient in its bucket) is valid again when it is back. Gradients are not copied: every
update clears them before it adds to them.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from spell_megatron.base.placement import Part
from spell_megatron.policy.learner import Learner


class LearnerOffload:
    """A `placement.Offloadable`. What lies on the host anyway (an offloaded optimizer) stays there."""

    parts: frozenset[Part] = frozenset({"parameters", "optimizer"})

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._away: dict[Part, list[tuple[torch.UntypedStorage, Tensor]]] = {}
        self._cleared: list[tuple[torch.UntypedStorage, int]] = []
        self._host = _HostMemory()

    def offload(self, parts: frozenset[Part], lost: frozenset[Part]) -> None:
        self._learner.settle()
        device = self._learner.world.device
        parameters = _storages(_parameters(self._learner), device)
        gradients = _storages(_gradients(self._learner), device, besides=parameters)
        # In float32 an optimizer works on the parameters themselves.
        optimizer = _storages(_optimizer(self._learner), device, besides={**parameters, **gradients})
        for part in parts:
            storages = parameters if part == "parameters" else optimizer
            self._away[part] = [(storage, self._host.copy(storage)) for storage in storages.values()]
        if "optimizer" in parts:
            self._cleared = [(storage, storage.nbytes()) for storage in gradients.values()]
        for storage, _ in (*(pair for part in parts for pair in self._away[part]), *self._cleared):
            storage.resize_(0)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # other processes cannot have what torch keeps for itself

    def onload(self, parts: frozenset[Part]) -> None:
        for part in parts:
            for storage, held in self._away.pop(part):
                storage.resize_(held.numel())
                _bytes(storage).copy_(held, non_blocking=True)
        if "optimizer" in parts:
            for storage, size in self._cleared:
                storage.resize_(size)
                _bytes(storage).zero_()
            self._cleared = []


class _HostMemory:
    """Host memory for storages that come and go: one piece for each, kept for the next time."""

    def __init__(self) -> None:
        self._pieces: dict[int, Tensor] = {}

    def copy(self, storage: torch.UntypedStorage) -> Tensor:
        """A copy of the storage's bytes."""
        piece = self._pieces.get(storage._cdata)
        if piece is None or piece.numel() != storage.nbytes():
            self._pieces.pop(storage._cdata, None)
            del piece  # so that there are never both
            piece = self._pieces[storage._cdata] = host_memory(storage.nbytes(), storage.device)
        return piece.copy_(_bytes(storage))


def host_memory(size: int, device: torch.device) -> Tensor:
    """Bytes on the host for copies from `device`: pinned on CUDA, where torch's own would be a power of two.

    They stay pinned until the last view of them is gone: what is freed while CUDA has it is lost to the machine, and
    nothing else at its addresses can be pinned.
    """
    piece = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        address = piece.data_ptr()
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, size, 0)))
        weakref.finalize(piece.untyped_storage(), _unpin, address).atexit = False  # CUDA ends by itself
    return piece


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


def _storages(
    tensors: Iterable[Tensor], device: torch.device, besides: Container[int] = ()
) -> dict[int, torch.UntypedStorage]:
    """Each storage on the device once, by identity, however many tensors are views of it."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device == device)
    return {storage._cdata: storage for storage in storages if storage._cdata not in besides}


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _parameters(learner: Learner) -> Iterator[Tensor]:
    for chunk in (*learner.chunks, *(learner.reference or ())):
        yield from (parameter.data for parameter in chunk.parameters())


def _gradients(learner: Learner) -> Iterator[Tensor]:
    for model in learner.models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            yield buffer.grad_data


def _optimizer(learner: Learner) -> Iterator[Tensor]:
    """Master weights and moments."""
    for optimizer in torch_optimizers(learner.optimizer):
        for group in optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """Megatron's optimizers hold others, at last torch's."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is not None:
        for part in chained:
            yield from torch_optimizers(part)
    elif getattr(optimizer, "optimizer", None) is not None:
        yield optimizer.optimizer
