"""A machine with one GPU that is not there: torch's names of it, collectives that move nothing, a dispatcher of
experts that is told what came of them. Everything is for the rest of the process."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fakecuda.waits import Watch, answer_for_values

_STATE = torch.zeros(16, dtype=torch.uint8)
_TYPES = {torch.bfloat16: "BFloat16Tensor", torch.float32: "FloatTensor"}


def switch_on(watch: Watch) -> None:
    torch._dynamo.config.disable = True  # what would be compiled for the device runs operation by operation
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
    answer_for_values(watch)
    _name_the_device(watch)
    _move_modules()
    _quiet_collectives(watch)
    _told_dispatcher()


def join_world(rank: int, size: int) -> None:
    """Be one rank of a world of which nothing else exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def _name_the_device(watch: Watch) -> None:
    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, *_: Any) -> None: ...
        def wait(self, *_: Any) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            watch.wait("Event.synchronize")

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def wait_stream(self, _: Any) -> None: ...
        def wait_event(self, _: Any) -> None: ...
        def record_event(self, *_: Any) -> Event:
            return Event()

        def synchronize(self) -> None:
            watch.wait("Stream.synchronize")

    stream = Stream()
    names: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "synchronize": lambda device=None: watch.wait("cuda.synchronize"),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda _: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda device=None: types.SimpleNamespace(
            major=9, minor=0, multi_processor_count=132
        ),
        "manual_seed": lambda _: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "get_rng_state": lambda *_, **__: _STATE,
        "set_rng_state": lambda *_, **__: None,
        "cudart": lambda: types.SimpleNamespace(cudaHostRegister=lambda *_: 0),
        "check_error": lambda _: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda *_, **__: None,
    }
    for name, value in names.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = (
        names["get_rng_state"],
        names["set_rng_state"],
    )
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state, random._set_cuda_rng_state = names["get_rng_state"], names["set_rng_state"]
    Tensor.record_stream = lambda self, _: None  # type: ignore[method-assign]
    type_of = Tensor.type

    def maybe_pinned(empty: Any, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.pin_memory() if pin_memory else made

    torch.empty, torch.empty_like = (
        partial(maybe_pinned, torch.empty),
        partial(maybe_pinned, torch.empty_like),
    )

    def name_of_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron compares with `torch.cuda.FloatTensor`, and fake tensors are of their own type."""
        if args or kwargs or not isinstance(self, FakeTensor):
            return type_of(self, *args, **kwargs)
        return ("torch.cuda." if self.is_cuda else "torch.") + _TYPES.get(self.dtype, "Tensor")

    Tensor.type = name_of_type  # type: ignore[method-assign]


def _move_modules() -> None:
    """`Module.to` gives a real tensor other memory; a fake parameter has to be another tensor."""

    def to(self: torch.nn.Module, device: Any, *_: Any, **__: Any) -> torch.nn.Module:
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    moved = torch.nn.Parameter(parameter.detach().to("cuda:0"), parameter.requires_grad)
                    moved.__dict__.update(
                        {k: v for k, v in parameter.__dict__.items() if k not in moved.__dict__}
                    )
                    module._parameters[name] = moved
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = buffer.to("cuda:0")
        return self

    torch.nn.Module.to = to  # type: ignore[method-assign, assignment]


class _Work:
    works = ()

    def wait(self, *_: Any) -> None: ...
    def append(self, *_: Any) -> None: ...


def _quiet_collectives(watch: Watch) -> None:
    """Of a tensor nothing is left but its shape, and no collective changes that."""
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers, mappings

    def nothing(*_: Any, **__: Any) -> _Work:
        return _Work()

    for name in (
        *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
        *("broadcast", "barrier", "send", "recv", "isend", "irecv"),
    ):
        setattr(dist, name, nothing)

    def exchange(*_: Any, **__: Any) -> _Work:
        watch.exchanges += 1
        return _Work()

    dist.all_to_all_single = exchange
    for module in (layers, mappings, param_and_grad_buffer):
        module.dist_all_gather_func = module.dist_reduce_scatter_func = nothing
    param_and_grad_buffer._coalescing_manager = lambda *_, **__: contextlib.nullcontext(_Work())

    def all_gather_object(into: list[Any], value: Any, group: Any = None) -> None:
        into[:] = [value] * len(into)

    def gather_object(value: Any, into: list[Any] | None = None, dst: int = 0, group: Any = None) -> None:
        if into is not None:
            all_gather_object(into, value)

    dist.all_gather_object, dist.gather_object = all_gather_object, gather_object
    dist.broadcast_object_list = lambda *_, **__: None
    create = mpu.create_group
    mpu.create_group = lambda *a, **k: create(*a, **{**k, "backend": None})  # gloo would be real


def stages_exchange(shape: tuple[int, int, int]) -> Any:
    """Inside, neighbouring pipeline stages say that what they send has this shape."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    return patch.object(P2PCommunicator, "_communicate_shapes", lambda *_: (shape, shape))


def _told_dispatcher() -> None:
    """Every expert gets as many tokens as any other: what the router says has no values."""
    from megatron.core.transformer.moe import token_dispatcher

    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    original = dispatcher._maybe_dtoh_and_synchronize

    def to_host(self: Any, point: str, tokens: Any = None) -> Any:
        tokens = original(self, point, tokens)
        rows = self.routing_map.shape[0] * self.config.moe_router_topk
        if self.ep_size > 1:
            self.input_splits = self.output_splits = np.array(_even(rows, self.ep_size))
        if self.num_local_experts > 1:
            ranks = self.tp_size * self.ep_size * self.num_local_experts
            self.num_global_tokens_per_local_expert = np.array(_even(rows, ranks))
        return np.array(_even(rows, self.num_local_experts)) if point == "before_finish" else tokens

    dispatcher._maybe_dtoh_and_synchronize = to_host
    token_dispatcher.sort_chunks_by_idxs = lambda tokens, *_, probs=None, **__: (tokens, probs)


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


@contextlib.contextmanager
def fake_tensors(watch: Watch) -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield
