"""Transformer Engine's own Python over an extension that is not there.

Its wheel on PyPI is all of its Python, and no kernel; the extension that has them, `transformer_engine_torch`, is this
module's. Of a kernel nothing is left but what it takes and gives: shapes, types and devices, and products, which stay
products, so that what a GPU would refuse is refused. What is not here refuses to be called, by its name.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

_PACKAGE = "transformer_engine"
_ABSENT = (
    *("onnx_extensions", "triton", "triton.cross_entropy", "triton.grouped_dbias_dscales"),
    *("triton.mhc", "triton.pad", "triton.permutation"),
)
"""Modules that want packages for a GPU or for exports."""


def install(site: Path) -> None:
    """Have `import transformer_engine` find what is in a folder, over the functions below."""
    sys.path.insert(0, str(site))
    common = types.ModuleType(f"{_PACKAGE}.common")  # its own looks for CUDA's libraries
    common.__path__ = [str(site / _PACKAGE / "common")]
    common.load_framework_extension = lambda _: None  # type: ignore[attr-defined]
    common.decode_cudnn_version = None  # type: ignore[attr-defined]
    names = [f"{_PACKAGE}_torch", *(f"{_PACKAGE}.pytorch.{name}" for name in _ABSENT)]
    sys.modules |= {name: _Absent(name) for name in names} | {common.__name__: common}
    extension = sys.modules[f"{_PACKAGE}_torch"]
    vars(extension).update(_THERE)
    importlib.import_module(_PACKAGE).common = common  # type: ignore[attr-defined]
    # Imported here, since what is wrong with it would else be taken for a package that is not there.
    known = importlib.import_module(f"{_PACKAGE}.pytorch.cpp_extensions")
    known.__getattr__ = extension.__getattr__  # type: ignore[method-assign]
    _keep_counts(sys.modules[f"{_PACKAGE}.pytorch"].GroupedLinear)


def _keep_counts(layer: Any) -> None:
    """How many tokens go to each expert is known to the host, and stays so."""
    forward = layer.forward

    def call(self: Any, x: Tensor, counts: list[int], **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            known = torch.tensor(counts)
        return forward(self, x, known, **kwargs)

    layer.forward = call


class _Absent(types.ModuleType):
    """A module that has every name there is, none of which can be used."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        missing = _Missing(f"{self.__name__}.{name}", (), {})
        setattr(self, name, missing)
        return missing


class _Missing(type):
    """A function or a type that is not there. Enumerations are compared as they are imported: of these every name is a
    number, and there are the names that were asked for."""

    def __getattr__(cls, name: str) -> Any:
        numbers = {key: number for key, number in vars(cls).items() if isinstance(number, int)}
        if name == "__members__":
            return numbers
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(numbers))
        return len(numbers)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"the extension that is not there has no {cls.__name__}")


def _torch(kind: Any) -> torch.dtype:
    """The type that Transformer Engine has a number for."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[kind]


def _product(a: Tensor, turn_a: bool, b: Tensor, turn_b: bool, out: Tensor | None, add: bool) -> Tensor:
    """As cuBLAS has it, column after column: `op(b) @ op(a)`, which may be wider than its factors."""
    rows, columns = b.flatten(0, -2), a.flatten(0, -2)
    made = (rows.t() if turn_b else rows) @ (columns.t() if turn_a else columns)
    if out is None:
        return made if turn_b else made.view(*b.shape[:-1], -1)
    return out.add_(made) if add else out.copy_(made.view(out.shape))


def generic_gemm(
    a: Tensor,
    turn_a: bool,
    b: Tensor,
    turn_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_type: int | None,
    bias: Tensor | None,
    _bias_type: int,
    gelu: bool,
    _gelu_in: Any,
    gradient: bool,
    _workspace: Tensor,
    _workspace_size: int,
    accumulate: bool,
    _split: bool,
    **_: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    assert quantizer is None and not gelu
    made = _product(a, turn_a, b, turn_b, out, accumulate)
    if out is None and out_type is not None:
        made = made.to(_torch(out_type))
    if bias is None:
        return made, None, None, None
    return (made, b.flatten(0, -2).sum(0), None, None) if gradient else (made + bias, None, None, None)


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    turn_a: bool,
    b: Sequence[Tensor],
    turn_b: bool,
    out: Sequence[Tensor],
    _out_type: int,
    rows: Sequence[int] | None,
    bias: Any,
    _bias_type: int,
    single: bool,
    _gelu_input: Any,
    _gradient: bool,
    _workspaces: Any,
    _workspace_size: int,
    accumulate: bool,
    *_: Any,
) -> Any:
    parts = out[0].split(list(rows or ())) if single else out
    for left, right, into in zip(a, b, parts, strict=True):
        _product(left, turn_a, right, turn_b, into, accumulate)
    return bias


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, _eps: float, out: Tensor | None, quantizer: Any, kind: int, *_: Any
) -> tuple[Tensor, None, Tensor]:
    assert quantizer is None and weight.device == x.device
    made = torch.empty_like(x, dtype=_torch(kind)) if out is None else out
    return made, None, x.new_empty(x.shape[0], dtype=torch.float32)


def rmsnorm_bwd(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    assert grad.shape == x.shape and scale.dtype is torch.float32
    return torch.empty_like(x), torch.empty_like(weight)


def fused_rope(x: Tensor, angles: Tensor, *_: Any) -> Tensor:
    assert angles.dtype is torch.float32 and angles.shape[0] >= x.shape[0] and angles.device == x.device
    return torch.empty_like(x)


def multi_tensor_adam(_chunk: int, _skip: Tensor, lists: Sequence[Sequence[Tensor]], *_: Any) -> None:
    """Of gradients, parameters and two moments."""
    for tensors in zip(*lists, strict=True):
        assert {(t.dtype, t.device.type, t.shape) for t in tensors} == {
            (torch.float32, "cuda", tensors[0].shape)
        }


def multi_tensor_l2norm(
    _chunk: int, _skip: Tensor, lists: Sequence[Sequence[Tensor]], *_: Any
) -> tuple[Tensor, Tensor]:
    return lists[0][0].new_empty(1, dtype=torch.float32), lists[0][0].new_empty(0)


def multi_tensor_scale(_chunk: int, _skip: Tensor, lists: Sequence[Sequence[Tensor]], _factor: float) -> None:
    assert all(source.device == target.device for source, target in zip(*lists, strict=True))


_THERE = {
    "generic_gemm": generic_gemm,
    "te_general_grouped_gemm": te_general_grouped_gemm,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
    "fused_rope_forward": fused_rope,
    "fused_rope_backward": fused_rope,
    "multi_tensor_adam": multi_tensor_adam,
    "multi_tensor_l2norm": multi_tensor_l2norm,
    "multi_tensor_scale": multi_tensor_scale,
    "get_num_cublas_streams": lambda: 4,
    "get_cublasLt_version": lambda: 130100,
}
