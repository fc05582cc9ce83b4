"""Weights for engines on the trainer's own devices, handed over in memory that both can see.

Every rank gathers the whole stream, bucket by bucket, into a buffer on its own device; every engine worker reads
the buffer of a rank on its device, so nothing leaves a device, or a node. Rank 0 alone speaks to the servers, and all
ranks wait for each other around a bucket. On CUDA this is vLLM's `ipc` backend, whose buffers are named by CUDA's
handles; on a CPU it is `shm`, and they are named memory of the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from vllm.device_allocator.alloc_conf import (
    EXPANDABLE_SEGMENTS,
    alloc_conf_from_env,
    conf_flag_enabled,
    with_conf_flag,
)
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferUpdatePayload,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from spell_megatron.rollout.transfer import shm
from spell_megatron.rollout.transfer.manifest import STAGED_BYTES, Manifest

_WIDEST = 8
"""Bytes of an element, at most."""


class LocalSender:
    """This rank's part of all transfers. Rank 0's client speaks to the servers, the others' is never asked."""

    def __init__(self, way: str, manifest: Manifest) -> None:
        self._way = way
        self._manifest = manifest
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._buffer = shm.Buffer(manifest.largest * _WIDEST)

    def send(
        self, weights: Iterable[tuple[str, torch.Tensor]], client: VLLMWeightSyncClient | None = None
    ) -> None:
        """A collective over all ranks of the trainer, each with its own copy of the stream."""
        stream = iter(self._manifest.checked(weights))
        first = next(stream)  # there is one, or `checked` has raised
        source = _Once(chain([first], stream))
        trainer = WeightTransferTrainerFactory.trainer_init(
            self._init_info(first[1].dtype), client=client or _Nobody(), source=source
        )
        if self._way == "ipc":
            torch.cuda.synchronize()  # the copies wait for their own stream alone
            _expand_segments(False)
        trainer.send_weights()

    def close(self) -> None:
        self._buffer.close()

    def _init_info(self, dtype: torch.dtype) -> TrainerInitInfo:
        if self._way == "ipc":
            size = staging_bytes(self._manifest, dtype)
            return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=self._rank)
        shm.register()
        return shm.ShmTrainerInit(self._buffer, rank=self._rank)


class _Once(WeightSource):
    """A stream that is read once, by a sender that asks for no metadata."""

    def __init__(self, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._stream = stream

    def metadata(self) -> list[ParamMeta]:
        raise NotImplementedError("a stream is known when it has passed")

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        _expand_segments(True)
        yield from self._stream


class _Nobody:
    """The client of a rank that speaks to nobody."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def staging_bytes(manifest: Manifest, dtype: torch.dtype) -> int:
    """Bytes of a buffer that any tensor of the model fits into: vLLM cuts none in two."""
    return max(STAGED_BYTES, manifest.largest * dtype.itemsize)


def _expand_segments(on: bool) -> None:
    """Where the allocator's segments expand, other processes open them slowly: vLLM's buffer, which it makes just
    before it asks for the first tensor, is to lie outside."""
    configured = alloc_conf_from_env()  # torch forgets whatever it is not told again
    if torch.cuda.is_available() and conf_flag_enabled(configured, EXPANDABLE_SEGMENTS):
        torch.cuda.memory._set_allocator_settings(with_conf_flag(configured, EXPANDABLE_SEGMENTS, on))
