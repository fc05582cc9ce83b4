"""Where the host waits for the device, and what is computed in which precision, while fake tensors run on it.

A fake tensor has a shape, a type and a device, and no values: what asks for values is given zeros, and noted with the
line that asked, of our code, megatron-core's or Transformer Engine's. Operations whose operands lie on two devices are
errors of torch's own, products of two types of ours.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.mm.out)
_FLASH = (_aten._flash_attention_forward.default, _aten._flash_attention_backward.default)
_OURS, _UPSTREAM, _ENGINE = "/spell_megatron/", "/megatron/core/", "/transformer_engine/"
_LAYERS = (
    *(_OURS + f"policy/{name}" for name in ("attention", "kernels/", "layers", "norm", "offload", "replay")),
    *(_UPSTREAM + f"{name}/" for name in ("transformer", "tensor_parallel", "fusions")),
    *(_ENGINE + f"pytorch/{name}" for name in ("attention/", "module/", "ops/", "permutation")),
)


@dataclass(frozen=True)
class Place:
    phase: str
    what: str
    file: str
    line: int
    layer: bool
    """Inside of a transformer layer, forward or backward."""


class Watch(TorchDispatchMode):
    """Notes waits and wide products; inside of `FakeTensorMode`."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "build"
        self.top_k = 1
        self.waits: Counter[Place] = Counter()
        self.wide: Counter[Place] = Counter()
        """Products in float32, which the tensor cores would not make."""
        self.attention: Counter[str] = Counter()
        """Calls of the flash kernels."""
        self.exchanges = 0
        """All-to-alls, which the machine counts."""
        self.left = 0
        """Tensors of floating point that left for the host without a wait."""
        self.bytes = 0
        """Read and written by operations on the device, views and allocations apart."""

    def wait(self, what: str) -> None:
        self.waits[self._place(what)] += 1

    def _place(self, what: str) -> Place:
        frame: FrameType | None = sys._getframe(1)
        where, layer = ("?", 0), False
        while frame is not None:
            file = frame.f_code.co_filename
            source = next((each for each in (_OURS, _UPSTREAM, _ENGINE) if each in file), None)
            if source and where[0] == "?":
                where = (file[file.rindex(source) + 1 :], frame.f_lineno)
            layer = layer or any(part in file for part in _LAYERS)
            frame = frame.f_back
        return Place(self.phase, what, *where, layer)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (_aten._to_copy.default, _aten.copy_.default):
            self._copy(func, args, kwargs)
        elif func is _aten.masked_select.default and _on_device(args[0]):
            self.wait("masked_select")  # of the dispatcher, which sends every token to so many experts
            return args[0].new_empty(args[1].shape[1] * self.top_k)
        elif func in (_aten.nonzero.default, _aten._local_scalar_dense.default):
            self.wait(func.__name__)
        elif func is _aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.wait("boolean index")
        elif func in _PRODUCTS and _on_device(args[0]):
            kinds = {factor.dtype for factor in args}
            assert len(kinds) == 1, f"a product of two types: {kinds}"  # fake tensors would allow it
            if torch.float32 in kinds:
                self.wide[self._place("product")] += 1
        elif func in _FLASH:
            self.attention["forward" if func is _FLASH[0] else "backward"] += 1
            assert all(t.dtype in (torch.bfloat16, torch.float16) for t in args[:3]), (
                "flash wants half precision"
            )
            ends = args[3:5] if func is _FLASH[0] else args[6:8]
            assert all(t.dtype is torch.int32 and _on_device(t) for t in ends), "lengths are int32, there"
        out = func(*args, **kwargs)
        if not func.is_view and "empty" not in func.__name__:
            moved = [*args, *(out if isinstance(out, (tuple, list)) else [out])]
            self.bytes += sum(t.nbytes for t in moved if isinstance(t, Tensor) and _on_device(t))
        return out

    def _copy(self, func: Any, args: Any, kwargs: Any) -> None:
        into = func is _aten.copy_.default
        source = args[1] if into else args[0]
        target = torch.device(args[0].device if into else kwargs.get("device") or source.device)
        later = (args[2] if len(args) > 2 else False) if into else kwargs.get("non_blocking", False)
        if _on_device(source) and target.type == "cpu":
            self.left += bool(later) and source.is_floating_point()
            if not later:
                self.wait("copy to the host")
        sent = source.device.type == "cpu" and target.type == "cuda" and source.ndim and source.numel()
        if sent and not (later and getattr(source, "pinned", False)):
            self.wait("copy from memory that is not pinned")


def _on_device(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.device.type == "cuda"


_NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_, torch.float64: np.float64}


def _zeros(tensor: Tensor) -> np.ndarray:
    return np.zeros(tuple(tensor.shape), dtype=_NUMPY.get(tensor.dtype, np.float32))


_ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: 1,
    "__bool__": lambda t: True,
    "__int__": lambda t: 0,
    "__index__": lambda t: 0,
    "__float__": lambda t: 0.0,
    "numpy": _zeros,
    "tolist": lambda t: _zeros(t).tolist(),
}


def answer_for_values(watch: Watch) -> None:
    """Have what asks a fake tensor for its values noted, and answered. For the rest of the process."""
    for name, answer in _ANSWERS.items():
        call = _answering(name, getattr(Tensor, name), answer, watch)
        for owner in (Tensor, FakeTensor) if name in vars(FakeTensor) else (Tensor,):
            setattr(owner, name, call)

    def pin_memory(self: Tensor, *_: Any) -> Tensor:
        pinned = self if isinstance(self, FakeTensor) else self.clone()
        pinned.pinned = True  # type: ignore[attr-defined]
        return pinned

    Tensor.pin_memory = pin_memory  # type: ignore[method-assign]


def _answering(name: str, original: Any, answer: Callable[[Tensor], Any], watch: Watch) -> Callable[..., Any]:
    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, FakeTensor):
            return original(self, *args, **kwargs)
        if _on_device(self):
            watch.wait(name)
        return answer(self)

    return call
