"""What layers keep for their backward pass, in host memory until it comes.

Autograd hands over what it saves (`torch.autograd.graph.saved_tensors_hooks`). The layers that this is done for are
spread among others: one's tensors are copied out while those up to the next one compute, and back while they go
backward. So two such layers at a time lie on the device, whatever their number. Copies are exact, and in the same order
of memory.

Each way has a stream of its own. Memory goes back to the stream that it is from: the computing stream waits for the
copy and then lets go of the tensor, so that torch may give its memory to what is computed next.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_LEAST = 1 << 20
"""Bytes of a tensor that is worth a copy."""


def keep_on_host(layers: Sequence[nn.Module], count: int, device: torch.device) -> None:
    """Have `count` of these consecutive layers, fewer than all, keep their tensors in host memory. The last one does
    not: while it computes, the way out ends and the way back begins."""
    ways, chosen = _Ways(device), [index * len(layers) // count for index in range(count)]
    for index in (*chosen, len(layers) - 1):
        forward = ways.around(layers[index], first=index == 0, last=index == len(layers) - 1)
        layers[index].forward = forward


class _Ways:
    """Out and back, for the layers of one chunk."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.streams = device, torch.get_device_module(device)
        self.out, self.back = self.streams.Stream(), self.streams.Stream()
        self._leaving: _Kept | None = None

    def around(self, layer: nn.Module, *, first: bool, last: bool) -> Callable[..., Any]:
        """A layer's forward pass, which returns its output first."""
        forward = layer.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            before = None if first else self._leaving
            if last:
                result, self._leaving = forward(*args, **kwargs), None
            else:
                kept = self._leaving = _Kept(layer, self)
                with saved_tensors_hooks(kept.pack, _unpack):
                    result = forward(*args, **kwargs)
                kept.depart()
            if before is not None:
                before.let_go()
                result[0].register_hook(before.bring_back)
            return result

        return call


class _Kept:
    """What one layer keeps in one forward pass."""

    def __init__(self, layer: nn.Module, ways: _Ways) -> None:
        self._ways = ways
        self._weights = {weight.untyped_storage()._cdata for weight in layer.parameters()}
        self._known: dict[tuple[Any, ...], tuple[Tensor, _Away]] = {}
        self._away: list[weakref.ref[_Away]] = []  # which autograd has, until it is done with them
        self._gone: Any = None
        self._returned: Any = None
        self._is_back = False

    def pack(self, tensor: Tensor) -> Tensor | _Away:
        """What autograd is to keep instead: one copy of a tensor, however often it is saved."""
        storage = tensor.untyped_storage()._cdata
        small = tensor.nbytes < _LEAST or not tensor.is_floating_point()
        if small or tensor.device != self._ways.device or storage in self._weights:
            return tensor
        place = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in self._known:  # it holds the tensor: no other can come to lie there
            away = _Away(self._copy_out(tensor), self)
            self._known[place] = tensor, away
            self._away.append(weakref.ref(away))
        return self._known[place][1]

    def _copy_out(self, tensor: Tensor) -> Tensor:
        ways = self._ways
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        ways.out.wait_stream(ways.streams.current_stream())
        with ways.streams.stream(ways.out):
            return host.copy_(tensor, non_blocking=True)

    def depart(self) -> None:
        """The layer has kept all that it does."""
        self._gone = self._ways.out.record_event()

    def let_go(self) -> None:
        """Of the device's tensors, once they have left."""
        self._ways.streams.current_stream().wait_event(self._gone)
        self._known.clear()

    def bring_back(self, _gradient: Tensor | None = None) -> None:
        """Begin to copy everything back, the last first."""
        if self._is_back:
            return
        self._is_back, ways = True, self._ways
        wanted = [away for known in reversed(self._away) if (away := known()) is not None]
        for away in wanted:
            away.tensor = torch.empty_like(away.host, device=ways.device)
        ways.back.wait_stream(ways.streams.current_stream())  # whose memory that was
        with ways.streams.stream(ways.back):
            for away in wanted:
                away.tensor.copy_(away.host, non_blocking=True)
        self._returned = ways.back.record_event()

    def wait(self) -> None:
        """Until everything is back."""
        self.bring_back()
        self._ways.streams.current_stream().wait_event(self._returned)


class _Away:
    """A tensor on the host, in place of one that autograd saved."""

    tensor: Tensor

    def __init__(self, host: Tensor, kept: _Kept) -> None:
        self.host, self.kept = host, kept


def _unpack(saved: Tensor | _Away) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    saved.kept.wait()
    return saved.tensor.detach()  # whoever clears it clears his own
