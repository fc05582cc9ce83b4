"""One transfer from the trainer to a set of engine servers, from the pause to the verified version.

Whatever fails, and wherever, the engines that took part serve nothing before another transfer succeeds, and
the error says what was on its way and who did not answer.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from spell_megatron.config import Servers
from spell_megatron.rollout import backend
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.server import free_port
from spell_megatron.rollout.transfer import gloo
from spell_megatron.rollout.transfer.fanout import FanOut, Peer
from spell_megatron.rollout.transfer.manifest import Manifest
from spell_megatron.rollout.transfer.store import WeightStore


class TransferError(EngineError):
    """A transfer failed. `culprits` are the engines that did not answer; the others hold half the weights."""

    def __init__(self, message: str, culprits: frozenset[str]) -> None:
        super().__init__(message)
        self.culprits = culprits


class Sender:
    """The trainer's end of all transfers. Connects anew whenever the set of engines changes.

    `store` is where the weights come from: offer them there first.
    """

    def __init__(self, manifest: Manifest, settings: Servers) -> None:
        self._backend = backend.transfer(settings.transfer)
        self._host = _reachable(settings.host)
        self._timeout = settings.sync_seconds
        self._pause = "wait" if settings.in_flight == "finish" else "abort"
        self._drain_seconds = settings.request_seconds
        self._summed = settings.verify == "checksum"
        device = torch.device("cpu" if self._backend == gloo.NAME else "cuda")
        self.store = WeightStore(manifest, device, summed=self._summed)
        self._connection: tuple[tuple[Peer, ...], TrainerWeightTransferEngine[Any]] | None = None

    def send(self, peers: Sequence[Peer], version: int) -> None:
        """Bring `peers` to `version`, with weights from the store; they serve it when this returns.

        Raises TransferError; then none of them may serve before another transfer succeeds.
        """
        client = FanOut(peers, version, self._timeout)
        try:
            client.greet()
            client.post("/pause", params={"mode": self._pause}, timeout=self._drain_seconds)
            trainer = self._connect(tuple(peers), client)
            trainer.client = client
            if self._summed:
                client.watch()
            self.store.reached = ""
            trainer.send_weights()
            client.post("/reset_prefix_cache")
            client.verify()
            if self._summed:
                client.compare(self.store.sums)
            client.post("/resume")
        except Exception as error:
            self._disconnect()
            silent = client.silent()
            client.abandon()
            names = ", ".join(peer.name for peer in peers)
            where = f" by {self.store.reached}" if self.store.reached else ""
            among = f"; no answer from {', '.join(sorted(silent))}" if silent else ""
            raise TransferError(
                f"the {self._backend} transfer of version {version} to {names} failed{where}: {error}{among}",
                silent,
            ) from error
        finally:
            client.close()

    def close(self) -> None:
        self._disconnect()

    def _connect(self, peers: tuple[Peer, ...], client: FanOut) -> TrainerWeightTransferEngine[Any]:
        if self._connection is None or self._connection[0] != peers:
            self._disconnect()
            world_size = 1 + sum(peer.world_size for peer in peers)
            trainer = WeightTransferTrainerFactory.trainer_init(
                self._init_info(world_size), client=client, source=self.store
            )
            self._connection = (peers, trainer)
        return self._connection[1]

    def _init_info(self, world_size: int) -> TrainerInitInfo:
        if self._backend == "ipc":
            return IPCTrainerInitInfo(rank=0, packed=True)
        port = free_port(self._host)
        if self._backend == "nccl":
            return NCCLTrainerInitInfo(self._host, port, world_size, rank=0)
        gloo.register()
        return gloo.GlooTrainerInit(self._host, port, world_size, self._timeout, rank=0)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection[1].shutdown()
            self._connection = None


def _reachable(host: str) -> str:
    """An address of this machine that engines can connect to."""
    return socket.gethostbyname(socket.gethostname()) if host == "0.0.0.0" else host
