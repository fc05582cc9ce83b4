"""Transfers from the trainer to engine servers, from the pause to the verified version.

Weights travel in one of two ways. Engines elsewhere share a communicator with the trainer's rank 0 (`Elsewhere`).
Engines on the trainer's own devices are given them by the ranks there (`local`), every rank's by itself.

Whatever fails, and wherever: a transfer ends in time, an engine that is not verified to hold the new weights serves
nothing before another transfer succeeds, and the error says what was on its way and who did not answer.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

import torch
import vllm
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from spell_megatron.base.rendezvous import own_address
from spell_megatron.base.topology import LOCAL, Transfer
from spell_megatron.config import ServersConfig
from spell_megatron.rollout.dialect import PAUSES, Route
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.transfer import gloo, nccl
from spell_megatron.rollout.transfer.checksum import noted
from spell_megatron.rollout.transfer.fanout import FanOut, Fault, Peer
from spell_megatron.rollout.transfer.local import LocalSender
from spell_megatron.rollout.transfer.manifest import Manifest
from spell_megatron.rollout.transfer.store import WeightStore

_log = logging.getLogger(__name__)
Weights = Iterable[tuple[str, torch.Tensor]]
Faults = dict[str, Fault]
"""By engine; who is not in it holds the weights, verified."""


class Sender(Protocol):
    """Rank 0's end of all transfers."""

    def update(self, peers: Sequence[Peer], version: int, weights: Weights) -> Faults:
        """Bring `peers` to a new version; they serve it when this returns. Consumes the stream, whoever fails;
        raises what the stream raises."""
        ...

    def repeat(self, peers: Sequence[Peer], version: int) -> Faults | None:
        """The same version once more, for engines that were not there. None where it is not kept."""
        ...

    def close(self) -> None: ...


def sender(manifest: Manifest, settings: ServersConfig, way: Transfer) -> Sender:
    if way in LOCAL:
        return Nearby(way, manifest, settings)
    on_cpu = way == gloo.NAME
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    return Elsewhere(way, manifest, settings, device)


class Nearby:
    """To engines on the trainer's devices: rank 0 is one of the ranks that hand over weights, and speaks for all.

    Engines have nothing in common but rank 0, so the failure of one is its own. Nothing is kept.
    """

    def __init__(self, way: str, manifest: Manifest, settings: ServersConfig) -> None:
        self._protocol = _Protocol(way, settings)
        self._local = LocalSender(way, manifest)

    def update(self, peers: Sequence[Peer], version: int, weights: Weights) -> Faults:
        client = self._protocol.client(peers, version, apart=True)
        sums: dict[str, int] = {}
        source = _watched(noted(weights, sums) if self._protocol.summed else weights, client)
        try:
            self._protocol.open(client)
            self._protocol.run(client, lambda: self._local.send(source, client), sums)
        except Exception as error:  # the stream's, which every rank meets
            client.fail(error)
            raise
        finally:
            client.abandon()
            client.close()
        return self._protocol.reported(client, peers, version)

    def repeat(self, peers: Sequence[Peer], version: int) -> Faults | None:
        return None

    def close(self) -> None:
        self._local.close()


class Elsewhere:
    """To engines that share a communicator with rank 0. Connects anew whenever the set of engines changes.

    The communicator belongs to a thread of its own: it may never return. Whoever fails ends the transfer for all.
    """

    def __init__(self, way: str, manifest: Manifest, settings: ServersConfig, device: torch.device) -> None:
        self._way, self._device = way, device
        gloo.register()
        nccl.register()
        self._protocol = _Protocol(way, settings)
        self._host = _reachable(settings.host)
        self._seconds = settings.sync_seconds
        self._store = WeightStore(manifest, device, summed=self._protocol.summed)
        self._peers: tuple[Peer, ...] = ()
        self._joined: set[Peer] = set()
        """Who was given a communicator and not told to let go of it, in this set of engines or one before."""
        self._trainer: TrainerWeightTransferEngine[Any] | None = None

    def update(self, peers: Sequence[Peer], version: int, weights: Weights) -> Faults:
        self._store.begin()
        with self._sending(peers, version) as faults:
            self._store.fill(weights, version)
        return faults

    def repeat(self, peers: Sequence[Peer], version: int) -> Faults | None:
        if self._store.version != version:
            return None
        with self._sending(peers, version) as faults:
            pass
        return faults

    def close(self) -> None:
        self._disconnect()

    @contextlib.contextmanager
    def _sending(self, peers: Sequence[Peer], version: int) -> Iterator[Faults]:
        """Send what is in the store while the block runs, and wait for the end of it."""
        faults: Faults = {}
        if not peers:
            yield faults
            return
        client = self._protocol.client(peers, version)
        client.reached = lambda: self._store.reached
        sent: Future[None] = Future()
        try:
            self._protocol.open(client)
        except EngineError as error:
            sent.set_exception(error)
        else:
            sent = _on_a_thread(lambda: self._send(tuple(peers), client))
        try:
            yield faults
        finally:
            self._conclude(sent, client)
            faults |= self._protocol.reported(client, peers, version)
            client.close()

    def _send(self, peers: tuple[Peer, ...], client: FanOut) -> None:
        """Runs on the communicator's thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._protocol.run(client, lambda: self._connected(peers, client).send_weights(), self._store.sums)

    def _conclude(self, sent: Future[None], client: FanOut) -> None:
        """Wait for a transfer to end, and see to it that it does."""
        wait((sent, client.failing), client.remaining, FIRST_COMPLETED)
        if (
            not sent.done()
        ):  # an engine has failed, or the time is over: whoever waits for the others does so in vain
            self._disconnect()
            wait((sent,), client.remaining)
        error = sent.exception() if sent.done() else EngineError("the time was over")
        if error is not None:
            self._disconnect()
            client.fail(error)
            client.abandon()

    def _connected(self, peers: tuple[Peer, ...], client: FanOut) -> TrainerWeightTransferEngine[Any]:
        if self._trainer is None or self._peers != peers:
            client.release(tuple(self._joined))
            self._joined.difference_update(peers)
            self._disconnect()
            world_size = 1 + sum(peer.world_size for peer in peers)
            trainer = WeightTransferTrainerFactory.trainer_init(
                self._init_info(world_size), client=client, source=self._store
            )
            if client.failing.done():  # called off meanwhile
                trainer.shutdown()
                raise EngineError("the engines were connected too late")
            self._trainer, self._peers = trainer, peers
            self._joined.update(peers)
        self._trainer.client = client
        return self._trainer

    def _init_info(self, world_size: int) -> TrainerInitInfo:
        if self._way == nccl.NAME:
            # Before 0.33 a receiver may overwrite one of two buffers while a reload still reads it.
            buffers = 1 if vllm.__version_tuple__ < (0, 33) else 2
            return nccl.NcclTrainerInit(world_size, packed_num_buffers=buffers, rank=0)
        return gloo.GlooTrainerInit(self._host, world_size, self._seconds, rank=0)

    def _disconnect(self) -> None:
        """Abort the communicator: who is in a collective of it, here or there, gets out."""
        trainer, self._trainer, self._peers = self._trainer, None, ()
        if trainer is not None:
            trainer.shutdown()


class _Protocol:
    """What is said to the servers around a transfer, whichever way the weights go."""

    def __init__(self, way: str, settings: ServersConfig) -> None:
        self._way = way
        self._seconds = settings.sync_seconds
        self._pause = PAUSES[settings.in_flight]
        self._drain_seconds = settings.request_seconds
        self.summed = settings.verify == "checksum"

    def client(self, peers: Sequence[Peer], version: int, *, apart: bool = False) -> FanOut:
        return FanOut(peers, version, self._seconds, apart=apart)

    def open(self, client: FanOut) -> None:
        """See whether everybody is there, before anything waits for them, and have them end what runs."""
        client.greet()
        client.post(Route.PAUSE, params={"mode": self._pause}, timeout=self._drain_seconds)

    def run(self, client: FanOut, send: Callable[[], None], sums: dict[str, int]) -> None:
        """`send`, and have the engines serve what they hold then."""
        if self.summed:
            client.watch()
        send()
        # The caches of what runs, too: before it goes on, it is computed anew by these weights.
        client.post(Route.FORGET_PREFIXES, params={"reset_running_requests": True})
        client.verify()
        if self.summed:
            client.compare(sums)
        client.resume()

    def reported(self, client: FanOut, peers: Collection[Peer], version: int) -> Faults:
        """The client's faults, told to the log as well."""
        if client.faults:
            names = ", ".join(peer.name for peer in peers)
            _log.warning("the %s transfer of version %d to %s failed%s", self._way, version, names, client)
        return dict(client.faults)


def _watched(weights: Weights, client: FanOut) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass a stream on, and tell the client how far it is."""
    reached = ""
    client.reached = lambda: reached
    for name, tensor in weights:
        reached = name
        yield name, tensor


def _on_a_thread(work: Callable[[], None]) -> Future[None]:
    """A thread that a program can end without: an executor's would be waited for."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="weight transfer", daemon=True).start()
    return done


def _reachable(host: str) -> str:
    """An address of this machine that engines can connect to. Raises EngineError where it knows none by itself."""
    if host != "0.0.0.0":
        return host
    with contextlib.suppress(OSError):
        if not (named := socket.gethostbyname(socket.gethostname())).startswith("127."):
            return named
    try:  # its name stands for itself alone: take the address that packets to elsewhere would bear
        return own_address("192.0.2.1")  # an address for documentation (RFC 5737)
    except OSError as error:
        raise EngineError(
            f"no address of this machine is known that engines elsewhere could reach ({error}): set"
            " rollout.servers.host to one (ip -br addr)"
        ) from None
