"""One transfer from the trainer to a set of engine servers, from the pause to the verified version.

vLLM's trainer engines speak to one inference server. `_FanOut` lets them speak to many: it posts every
call to all of them at once, gives each server its own ranks in the transfer group, and remembers who did
not answer, so that a failure names its culprits.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferUpdatePayload,
)
from vllm.distributed.weight_transfer.clients import _json_safe_update_payload
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from spell_megatron.config import Servers
from spell_megatron.rollout import backend
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.server import free_port
from spell_megatron.rollout.transfer import gloo
from spell_megatron.rollout.transfer.manifest import Manifest
from spell_megatron.rollout.transfer.store import WeightStore

_GRACE_SECONDS = 10.0
"""A worker whose tensor did not come needs this long to say so after its own timeout."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine server that takes part. A restarted server is another peer."""

    name: str
    url: str
    world_size: int
    incarnation: int


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
        self.store = WeightStore(manifest, torch.device("cpu" if self._backend == gloo.NAME else "cuda"))
        self._connection: tuple[tuple[Peer, ...], TrainerWeightTransferEngine[Any]] | None = None

    def send(self, peers: Sequence[Peer], version: int) -> None:
        """Bring `peers` to `version`, with weights from the store; they serve it when this returns.

        Raises TransferError; then none of them may serve before another transfer succeeds.
        """
        client = _FanOut(peers, version, self._timeout)
        try:
            client.greet()
            client.post("/pause", params={"mode": self._pause}, timeout=self._drain_seconds)
            trainer = self._connect(tuple(peers), client)
            trainer.client = client
            trainer.send_weights()
            client.post("/reset_prefix_cache")
            client.verify()
            client.post("/resume")
        except Exception as error:
            self._disconnect()
            silent = client.silent()
            client.abandon()
            among = f"; no answer from {', '.join(sorted(silent))}" if silent else ""
            names = ", ".join(peer.name for peer in peers)
            raise TransferError(
                f"the {self._backend} transfer of version {version} to {names} failed: {error}{among}", silent
            ) from error
        finally:
            client.close()

    def close(self) -> None:
        self._disconnect()

    def _connect(self, peers: tuple[Peer, ...], client: _FanOut) -> TrainerWeightTransferEngine[Any]:
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


class _FanOut:
    """vLLM's weight-sync client (`VLLMWeightSyncClient`) for several servers at once."""

    def __init__(self, peers: Sequence[Peer], version: int, timeout: float) -> None:
        self._peers = peers
        self._version = str(version)
        self._timeout = timeout + _GRACE_SECONDS
        self._clients = {peer: httpx.Client(base_url=peer.url, trust_env=False) for peer in peers}
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(peers)))
        self._unanswered: set[str] = set()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offset, infos = init_info.get("rank_offset", 0), {}
        for peer in self._peers:
            infos[peer] = {**init_info, "rank_offset": offset} if "rank_offset" in init_info else init_info
            offset += peer.world_size
        self._all(
            lambda peer: self._post(peer, "/init_weight_transfer_engine", json={"init_info": infos[peer]})
        )

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        self.post("/update_weights", json={"update_info": _json_safe_update_payload(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", json={"weight_version": self._version})

    def greet(self) -> None:
        """See whether everybody is there, before anything waits for them."""
        self._all(self._held)

    def verify(self) -> None:
        """Ask every engine which version it holds."""

        def check(peer: Peer) -> None:
            if (held := self._held(peer)) != self._version:
                raise EngineError(f"{peer.name} says that it holds version {held!r} after the update")

        self._all(check)

    def abandon(self) -> None:
        """Close an update that cannot be finished, where the engine has not done so itself."""
        for peer in self._peers:
            if peer.name not in self._unanswered:
                with contextlib.suppress(EngineError, httpx.HTTPError):
                    self._post(peer, "/finish_weight_update")

    def _held(self, peer: Peer) -> str:
        answer = self._clients[peer].get("/weight_info", timeout=self._timeout)
        return str(answer.json().get("weight_version"))

    def post(self, path: str, timeout: float | None = None, **arguments: Any) -> None:
        self._all(lambda peer: self._post(peer, path, timeout, **arguments))

    def silent(self) -> frozenset[str]:
        """Engines that a call did not reach, or that did not answer in time."""
        return frozenset(self._unanswered)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        for client in self._clients.values():
            client.close()

    def _post(self, peer: Peer, path: str, timeout: float | None = None, **arguments: Any) -> None:
        response = self._clients[peer].post(path, timeout=timeout or self._timeout, **arguments)
        if response.is_error:
            raise EngineError(f"{peer.name} answered {response.status_code} to {path}: {response.text[:300]}")

    def _all(self, call: Callable[[Peer], object]) -> None:
        """Call for every peer at once; raise the first error when all have ended."""
        calls = {peer: self._pool.submit(call, peer) for peer in self._peers}
        errors = []
        for peer, running in calls.items():
            error = running.exception()
            if error is None:
                continue
            if isinstance(error, httpx.HTTPError):
                self._unanswered.add(peer.name)
                error = EngineError(f"{peer.name} did not answer: {str(error) or type(error).__name__}")
            errors.append(error)
        if errors:
            raise errors[0]


def _reachable(host: str) -> str:
    """An address of this machine that engines can connect to."""
    return socket.gethostbyname(socket.gethostname()) if host == "0.0.0.0" else host
