"""Matrix products in float32 on a CPU whose vector units MKL does not fill.

torch multiplies float32 matrices with MKL, which takes its widest code path on Intel's processors only: with
AVX-512 on another's, oneDNN (which torch brings as well, and vLLM's CPU engine uses) is twice as fast. With AVX2 it is
a tenth faster where rows lie one after another, and slower where they do not. Products are half of a training step.
`product` is what Megatron's linear layers and our head call.

oneDNN compiles for every new shape, for half a millisecond. All layers share the shapes of a stream; experts, whose
tokens are never as many as before, have `product_into` and `product_over`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_patches.patch import Patch

_WORTH_IT = 50_000_000
"""Multiplications that take oneDNN as much less time than MKL as a new shape costs."""
_GRAIN = 256
"""Tokens of which a varying number is a multiple, but for a rest that MKL takes."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a [..., n, k] @ b [k, m]`, of any strides; the result may be a transposed view.

    For autograd functions: on a CPU it has no gradient of its own.
    """
    if not _is_for_onednn(a, b):
        return a @ b
    if a.ndim == 2 and a.shape[0] > b.shape[1] and not a.is_contiguous():
        return _linear(b.t(), a).t()  # a weight's gradient: its kernel wants the shorter side first
    return _linear(a, b.t())


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write `a [n, k] @ b [k, m]`, where `n` varies."""
    # With AVX2 the copy of its result takes longer than oneDNN is faster.
    wanted = _vectors() == "AVX512" and _is_for_onednn(a, b)
    cut = a.shape[0] // _GRAIN * _GRAIN if wanted else 0
    if cut:
        out[:cut] = _linear(a[:cut], b.t())
    torch.mm(a[cut:], b, out=out[cut:])


def product_over(a: Tensor, b: Tensor) -> Tensor:
    """`a [n, k] @ b [k, m]`, where `k` varies."""
    cut = a.shape[1] // _GRAIN * _GRAIN if _is_for_onednn(a, b) else 0
    rest = a[:, cut:] @ b[cut:]
    return rest.add_(product(a[:, :cut], b[:cut])) if cut else rest


def _is_for_onednn(a: Tensor, b: Tensor) -> bool:
    if a.dtype != torch.float32 or a.is_cuda or a.numel() * b.shape[1] < _WORTH_IT:
        return False
    return _vectors() == "AVX512" or (_vectors() == "AVX2" and a.stride(-1) == 1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.t()`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@functools.cache
def mkl_is_slow() -> bool:
    """Whether the processor has vectors that MKL does not use, as all but Intel's have."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "GenuineIntel" not in cpu.read_text(encoding="utf-8")


@functools.cache
def _vectors() -> str:
    """The widest instructions that torch uses here; none where MKL uses them as well, or oneDNN is missing."""
    there = mkl_is_slow() and torch.backends.mkldnn.is_available()
    return torch.backends.cpu.get_cpu_capability() if there else ""


class _Products(TorchFunctionMode):
    """Inside, every `matmul` is a `product`."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (torch.matmul, torch.Tensor.matmul) and not kwargs:
            return product(*args)
        return func(*args, **(kwargs or {}))


def _with_products(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any) -> Any:
        with _Products() if _vectors() else nullcontext():
            return method(*args)

    return call


def _upstream() -> Any:
    from megatron.core.tensor_parallel import layers

    return layers.LinearWithGradAccumulationAndAsyncCommunication


def _needed() -> bool:
    return "matmul(" in inspect.getsource(inspect.unwrap(_upstream().forward))


def _apply() -> None:
    linear = _upstream()
    linear.forward = staticmethod(_with_products(linear.forward))
    linear.backward = staticmethod(_with_products(linear.backward))


PATCH = Patch(
    name="cpu_products",
    scope="cpu",
    upstream="megatron/core/tensor_parallel/layers.py:488,531,614",
    breaks="nothing; on AMD's processors a training step takes longer, with AVX-512 a third",
    needed=_needed,
    apply=_apply,
)
