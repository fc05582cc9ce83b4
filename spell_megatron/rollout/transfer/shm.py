"""Transfer through memory of the host: vLLM's `ipc` for engines and a trainer that compute on CPUs.

Every rank of the trainer stages its stream in a buffer of its own, tensor by tensor, so that what was gathered is given
back at once; every worker loads a bucket from the buffer of one rank of its node, in place, while the ranks fill the
other half. The memory belongs to no file: it is gone with the last process that has it open, however that ends, and no
limit of /dev/shm applies to it.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.transfer.manifest import described
from spell_megatron.rollout.transfer.receiver import Receiver

NAME = "shm"
_BUCKET_BYTES = 128 << 20
_ALIGNMENT = 64
Bucket: TypeAlias = "list[tuple[str, torch.Tensor]]"


@dataclass
class ShmInit(WeightTransferInitInfo):
    rank_offset: int
    """Number of an engine's first worker among all workers, from 1, as in the other backends."""


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    """Place of each tensor in a buffer, in bytes: the same in all of them."""
    buffers: list[tuple[str, str]]
    """Path and label of every rank's buffer, by rank."""


class Buffer:
    """Memory that processes of this node can open by its name, in two halves.

    Each has room for a tensor of `largest` bytes; what was never written to takes no memory.
    """

    def __init__(self, largest: int) -> None:
        self._half = _aligned(max(largest, _BUCKET_BYTES))
        self._label = f"spell-{secrets.token_hex(8)}"

    @property
    def name(self) -> tuple[str, str]:
        """Path and label."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}", self._label

    def stage(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[Bucket, list[int]]]:
        """Copy a stream into the halves in turn; yields what is in one, and where each tensor begins.

        Who asks for the next bucket says that nobody reads the other half any more.
        """
        bucket: Bucket = []
        offsets: list[int] = []
        start = end = 0
        for name, tensor in weights:
            if bucket and end + tensor.nbytes > start + _BUCKET_BYTES:
                yield bucket, offsets
                bucket, offsets = [], []
                start = end = self._half - start
            place = _part(self._memory, end, tensor.dtype, tensor.shape)
            place.copy_(tensor)
            bucket.append((name, place))
            offsets.append(end)
            end += _aligned(tensor.nbytes)
        if bucket:
            yield bucket, offsets

    def close(self) -> None:
        vars(self).pop("_memory", None)
        if "_descriptor" in vars(self):
            os.close(vars(self).pop("_descriptor"))

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.memfd_create(self._label)
        os.ftruncate(descriptor, 2 * self._half)
        return descriptor

    @cached_property
    def _memory(self) -> torch.Tensor:
        return torch.frombuffer(mmap.mmap(self._descriptor, 0), dtype=torch.uint8)


class ShmReceiver(Receiver[ShmInit, ShmUpdate]):
    """The engine's end."""

    init_info_cls = ShmInit
    update_info_cls = ShmUpdate
    _place = 0
    _opened: tuple[list[Any], torch.Tensor] | None = None

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        parallel = self.parallel_config
        self._place = (
            init_info.rank_offset - 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        )

    def receive_weights(self, update_info: ShmUpdate) -> None:
        memory = self._open(update_info.buffers)
        described = zip(
            update_info.names, update_info.dtype_names, update_info.shapes, update_info.offsets, strict=True
        )
        self.load(
            (name, _part(memory, offset, getattr(torch, dtype), shape))
            for name, dtype, shape, offset in described
        )
        self.keep_from(memory)  # the trainer writes the next bucket over this one

    def shutdown(self) -> None:
        self._opened = None

    def _open(self, buffers: Sequence[Sequence[str]]) -> torch.Tensor:
        """The buffer of the rank with this worker's number, as if they had a device in common; where that is on another
        node, of one that is not."""
        names = [list(name) for name in buffers]
        if self._opened is None or self._opened[0] != names:
            first = self._place % len(names)
            mapped = (_mapped(*name) for name in (*names[first:], *names[:first]))
            memory = next((memory for memory in mapped if memory is not None), None)
            if memory is None:
                raise EngineError(
                    "no rank of the trainer shares memory with this worker: rollout.servers.transfer=shm wants one"
                    " on every node with engines, of the same user and in the same container"
                )
            self._opened = names, memory
        return self._opened[1]


@dataclass
class ShmTrainerInit(TrainerInitInfo):
    backend: ClassVar[str] = NAME

    buffer: Buffer


class ShmTrainer(TrainerWeightTransferEngine[ShmTrainerInit]):
    """The trainer's end, on every rank. Rank 0 tells the servers; the ranks meet around what these read."""

    init_info_cls = ShmTrainerInit
    source: WeightSource

    def __init__(
        self, client: VLLMWeightSyncClient, source: WeightSource, buffer: Buffer, *, is_sender: bool
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._buffer = buffer

    @classmethod
    def trainer_init(
        cls, init_info: ShmTrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> ShmTrainer:
        if source is None:
            raise ValueError("the shm backend sends whole models: it needs a WeightSource")
        if init_info.is_sender:
            client.init_weight_transfer_engine(asdict(ShmInit(rank_offset=1)))
        return cls(client, source, init_info.buffer, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        names = _everyones(self._buffer.name)
        if self.is_sender:
            self.client.start_weight_update()
        loaded: Future[None] | None = None
        with ThreadPoolExecutor(1) as pool:
            for bucket, offsets in self._buffer.stage(self.source):
                if loaded is not None:
                    loaded.result()
                _meet()  # everybody has staged this bucket, and the one before was read
                if self.is_sender:
                    loaded = pool.submit(
                        self.client.update_weights, asdict(ShmUpdate(*described(bucket), offsets, names))
                    )
            if loaded is not None:
                loaded.result()
            _meet()  # who goes on may write the next version
        if self.is_sender:
            self.client.finish_weight_update()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _part(memory: torch.Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[offset : offset + size].view(dtype).view(shape)


def _mapped(path: str, label: str) -> torch.Tensor | None:
    """The memory of that name, or None where it is another node's."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if os.readlink(f"/proc/self/fd/{descriptor}") != f"/memfd:{label} (deleted)":
            return None  # a number that somebody else has here
        return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
    finally:
        os.close(descriptor)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _meet() -> None:
    if not _alone():
        dist.barrier()


def _everyones(name: tuple[str, str]) -> list[tuple[str, str]]:
    if _alone():
        return [name]
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name)
    return names


def register() -> None:
    """Make the backend known to vLLM, once in a process."""
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, ShmReceiver)
        WeightTransferTrainerFactory.register_engine(NAME, ShmTrainer)
