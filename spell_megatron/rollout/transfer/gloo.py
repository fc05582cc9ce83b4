"""Transfer between CPUs: the trainer's rank 0 broadcasts to all workers of all engines of a session.

vLLM's own backends need a GPU. This one has the same two ends and speaks the same protocol. Tensors are
announced bucket by bucket, while the trainer gathers the next ones; every broadcast has a timeout.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import ClassVar

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

from spell_megatron.base import rendezvous
from spell_megatron.base.secret import new_secret
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.transfer.manifest import buckets, described
from spell_megatron.rollout.transfer.receiver import Receiver

NAME = "gloo"
_BUCKET_BYTES = 64 << 20


@dataclass
class GlooInit(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int
    """Rank of an engine's first worker; the trainer is rank 0."""
    world_size: int
    timeout_seconds: float
    key: str = field(repr=False)
    """What the members of this one group know."""


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInit(TrainerInitInfo):
    backend: ClassVar[str] = NAME

    master_address: str
    """Address of this machine, for engines to connect to. The port is the kernel's choice."""
    world_size: int
    timeout_seconds: float


def _join(store: dist.Store, key: str, rank: int, size: int, address: str, seconds: float) -> rendezvous.Gloo:
    """A group of those alone who know the key, which rank 0 gave to the engines behind their secret."""
    sealed = rendezvous.Sealed(store, key.encode())
    group = rendezvous.Gloo(sealed, rank, size, address=address, seconds=seconds)
    rendezvous.prove(group, key.encode())
    return group


def _broadcast(group: rendezvous.Gloo, tensor: torch.Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()  # type: ignore[attr-defined]


class GlooReceiver(Receiver[GlooInit, GlooUpdate]):
    """The engine's end."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: rendezvous.Gloo | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        host, seconds = init_info.master_address, init_info.timeout_seconds
        store = rendezvous.connect(host, init_info.master_port, seconds)
        address = rendezvous.own_address(host)
        self._group = _join(store, init_info.key, rank, init_info.world_size, address, seconds)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        group = self._group
        if group is None:
            raise RuntimeError("weights came before init_weight_transfer_engine")
        rank = group.rank()

        def arriving() -> Iterator[tuple[str, torch.Tensor]]:
            described = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
            for name, dtype, shape in described:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                try:
                    _broadcast(group, tensor)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"{name} {shape} did not reach rank {rank} in time: {error}"
                    ) from error
                yield name, tensor

        self.load(arriving())

    def shutdown(self) -> None:
        self._group = None


class GlooTrainer(TrainerWeightTransferEngine[GlooTrainerInit]):
    """The trainer's end. Only rank 0 sends; the other ranks take part in the gathering alone."""

    init_info_cls = GlooTrainerInit
    source: WeightSource

    def __init__(
        self,
        client: VLLMWeightSyncClient,
        source: WeightSource,
        group: rendezvous.Gloo | None,
        seconds: float,
    ) -> None:
        super().__init__(client=client, source=source, is_sender=group is not None)
        self._group = group
        self._seconds = seconds

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> GlooTrainer:
        if source is None:
            raise ValueError("the gloo backend sends whole models: it needs a WeightSource")
        info, group = init_info, None
        if info.is_sender:
            host, size, seconds = info.master_address, info.world_size, info.timeout_seconds
            bound, key = rendezvous.listening(host), new_secret()
            address, port = bound.getsockname()[:2]
            worker = GlooInit(host, port, 1, size, seconds, key)
            with ThreadPoolExecutor(1) as pool:  # both ends wait for each other
                joined = pool.submit(client.init_weight_transfer_engine, asdict(worker))
                group = _join(rendezvous.serve(bound, seconds), key, 0, size, address, seconds)
                joined.result()
        return cls(client, source, group, info.timeout_seconds)

    def send_weights(self) -> None:
        if self._group is None:
            for _ in self.source:
                pass
            return
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as pool:
            for bucket in buckets(self.source, _BUCKET_BYTES):
                update = GlooUpdate(*described(bucket))
                received = pool.submit(self.client.update_weights, asdict(update))
                for name, tensor in bucket:
                    try:
                        _broadcast(self._group, tensor.contiguous())
                    except RuntimeError as error:
                        refusal = received.exception() if received.done() else None
                        raise EngineError(
                            f"{name} {list(tensor.shape)} did not leave rank 0 within"
                            f" {self._seconds:.0f} s: {refusal or error}"
                        ) from error
                received.result()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self._group = None


def register() -> None:
    """Make the backend known to vLLM, once in a process."""
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, GlooReceiver)
        WeightTransferTrainerFactory.register_engine(NAME, GlooTrainer)
