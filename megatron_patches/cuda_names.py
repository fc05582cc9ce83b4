"""Names of torch that megatron-core calls without asking whether there is CUDA.

`torch.cuda.current_device()` is what megatron-core passes as `device=` everywhere (for instance
tensor_parallel/layers.py:261), so on a CPU it answers the CPU device.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_patches.patch import Patch


def _needed() -> bool:
    try:
        torch.cuda.current_device()
    except (AssertionError, RuntimeError):
        return True
    return False


class _Stream(torch.cpu.Stream):
    """torch's own returns None where upstream waits for an event."""

    def record_event(self) -> torch.cpu.Event:  # type: ignore[override]
        return torch.cpu.Event()


def _apply() -> None:
    stream = _Stream()

    def current_device() -> Any:
        return torch.device("cpu")

    def current_stream(device: Any = None) -> Any:
        del device
        return stream

    def synchronize(device: Any = None) -> None:
        del device

    def cuda(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self

    torch.cuda.current_device = current_device
    torch.cuda.current_stream = current_stream
    torch.cuda.synchronize = synchronize
    torch.Tensor.cuda = cuda  # type: ignore[method-assign, assignment]


PATCH = Patch(
    name="cuda_names",
    scope="cpu",
    upstream="megatron/core/tensor_parallel/layers.py:261 and about fifty more places",
    breaks="AssertionError: Torch not compiled with CUDA enabled",
    needed=_needed,
    apply=_apply,
)
