"""One weight update told to many servers at once.

vLLM's trainer engines speak to one inference server. `FanOut` lets them speak to many: it posts every call to
all of them at once, gives each server its own ranks in the transfer group, and writes down what each one did
wrong the moment that it is known.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import httpx
from vllm.distributed.weight_transfer.base import WeightTransferUpdatePayload
from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

from spell_megatron.rollout.address import Address
from spell_megatron.rollout.dialect import Route
from spell_megatron.rollout.engine import EngineError

_GRACE_SECONDS = 10.0
"""A worker whose tensor did not come needs this long to say so after its own timeout."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine server that takes part. A restarted server is another peer."""

    name: str
    address: Address
    world_size: int
    incarnation: int
    asleep: bool = field(default=False, compare=False)
    """Its cache is: it takes weights, and must not be resumed."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an engine does not hold the weights that it was sent."""

    message: str
    silent: bool
    """It did not answer at all: nothing can be asked of it before it is started again."""
    reached: str
    """The tensor that was on its way; empty where none was yet."""


class FanOut:
    """vLLM's weight-sync client (`VLLMWeightSyncClient`) for several servers at once.

    All calls together may take `timeout` seconds, and a little longer for a worker to say itself what did not
    come. `apart`, a server that fails is left out of what follows and the others go on, with the time that was
    theirs before; otherwise, where they share a communicator, the first fault ends the call for all of them.
    """

    def __init__(self, peers: Sequence[Peer], version: int, timeout: float, *, apart: bool = False) -> None:
        self._peers = peers
        self._version = str(version)
        self._apart = apart
        self._deadline = time.monotonic() + timeout + _GRACE_SECONDS
        once = httpx.Limits(max_keepalive_connections=0)  # after an error a server closes the connection
        self._clients = {peer: peer.address.client(trust_env=False, limits=once) for peer in peers}
        self._pool = ThreadPoolExecutor(2 * len(peers) + 1)  # an update that hangs can still be called off
        ends = accumulate((peer.world_size for peer in peers), initial=0)
        self._ranks = {
            peer: range(start + 1, end + 1) for peer, (start, end) in zip(peers, pairwise(ends), strict=True)
        }
        self.faults: dict[str, Fault] = {}
        """By the engine's name."""
        self.failing: Future[None] = Future()
        """Done as soon as there is a fault, while the call may still wait for the other servers."""
        self.reached: Callable[[], str] = str
        """Names the tensor on its way."""

    @property
    def remaining(self) -> float:
        """Seconds left for everything."""
        return max(0.0, self._deadline - time.monotonic())

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def info(peer: Peer) -> dict[str, Any]:
            own = {"rank_offset": self._ranks[peer].start} if "rank_offset" in init_info else {}
            return {**init_info, **own}

        self._all(lambda peer: self._post(peer, Route.OPEN_TRANSFER, json={"init_info": info(peer)}))

    def start_weight_update(self) -> None:
        self.post(Route.BEGIN_UPDATE)

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        self.post(Route.UPDATE, json={"update_info": _json_safe_update_payload(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post(Route.END_UPDATE, json={"weight_version": self._version})

    def resume(self) -> None:
        """Have them answer requests again. Who sleeps does when it wakes: before, a request would find no cache."""
        self._all(lambda peer: None if peer.asleep else self._post(peer, Route.RESUME))

    def greet(self) -> None:
        """See whether everybody is there, before anything waits for them, and refuse to go backwards.

        A fleet labels every server when it opens: a newer label is another trainer's.
        """

        def check(peer: Peer) -> None:
            held = self._held(peer)
            if held.isdecimal() and int(held) > int(self._version):
                raise EngineError(
                    f"{peer.name} ({peer.address}) holds version {held}, and {self._version} would take it back:"
                    " another trainer feeds it. Give every run servers of its own"
                )

        self._all(check)

    def verify(self) -> None:
        """Ask every engine which version it holds."""

        def check(peer: Peer) -> None:
            if (held := self._held(peer)) != self._version:
                raise EngineError(f"{peer.name} says that it holds version {held!r} after the update")

        self._all(check)

    def watch(self) -> None:
        """Have every worker keep checksums of what it is given."""
        self.post(Route.CALL_WORKERS, json={"method": "watch_weights"})

    def compare(self, sums: Mapping[str, int]) -> None:
        """Hold what every worker was given against what was sent."""

        def check(peer: Peer) -> None:
            answer = self._post(peer, Route.CALL_WORKERS, json={"method": "given_weights"})
            for rank, given in zip(self._ranks[peer], answer["results"], strict=True):
                wrong = sorted(
                    name for name in sums.keys() | given.keys() if sums.get(name) != given.get(name)
                )
                if wrong:
                    raise EngineError(
                        f"{peer.name} (rank {rank}) was given other weights than were sent: {len(wrong)}"
                        f" tensors, {wrong[0]} the first"
                    )

        self._all(check)

    def abandon(self) -> None:
        """Have engines that failed close their update, where they have not done so themselves, and let go of
        what they share with the trainer. Who does not answer that is silent, too."""

        def close(peer: Peer) -> None:
            for path in (Route.END_UPDATE, Route.CLOSE_TRANSFER):
                with contextlib.suppress(EngineError):  # nothing to finish, or to shut down
                    self._post(peer, path, _GRACE_SECONDS)

        with contextlib.suppress(EngineError):
            self._all(close, [peer for peer in self._peers if self._failed(peer) and not self._silent(peer)])

    def release(self, peers: Collection[Peer]) -> None:
        """Have those of `peers` that still take part let go of a communicator that is no longer used."""
        self._all(
            lambda peer: self._post(peer, Route.CLOSE_TRANSFER),
            [peer for peer in self._peers if peer in peers],
        )

    def _held(self, peer: Peer) -> str:
        answer = self._clients[peer].get(Route.WEIGHT_INFO, timeout=self.remaining)
        return str(answer.json().get("weight_version"))

    def post(self, path: str, timeout: float | None = None, **arguments: Any) -> None:
        """With a `timeout` of its own the call does not count as the transfer's time."""
        began = time.monotonic()
        self._all(lambda peer: self._post(peer, path, timeout, **arguments))
        if timeout is not None:
            self._deadline += time.monotonic() - began

    def fail(self, error: BaseException) -> None:
        """Nobody holds what was to be sent, for a reason that is no engine's."""
        for peer in self._peers:
            self._blame(peer, error)

    def close(self) -> None:
        self._pool.shutdown(wait=False)  # a call that nobody waits for any longer ends by itself
        for client in self._clients.values():
            client.close()

    def _post(self, peer: Peer, path: str, timeout: float | None = None, **arguments: Any) -> Any:
        response = self._clients[peer].post(path, timeout=timeout or self.remaining, **arguments)
        if response.is_error:
            raise EngineError(f"{peer.name} answered {response.status_code} to {path}: {response.text[:300]}")
        return response.json() if response.content else None

    def _all(self, call: Callable[[Peer], object], peers: Sequence[Peer] | None = None) -> None:
        """Call for every peer at once, or for those that have not failed; returns when all have ended."""
        if peers is None:
            peers = [peer for peer in self._peers if not (self._apart and self._failed(peer))]

        def succeeds(peer: Peer) -> bool:
            try:
                call(peer)
            except (EngineError, httpx.HTTPError, RuntimeError, ValueError) as error:
                # httpx raises RuntimeError where `close` came first; an answer that is not JSON is a ValueError
                self._blame(peer, error)
                return False
            return True

        began = time.monotonic()
        succeeded = list(self._pool.map(succeeds, peers))
        if all(succeeded):
            return
        if self._apart:
            self._deadline += time.monotonic() - began
        else:
            raise EngineError(self.faults[peers[succeeded.index(False)].name].message)

    def _blame(self, peer: Peer, error: BaseException) -> None:
        """Write a fault down. The first one is the reason; silence may come later."""
        silent = isinstance(error, httpx.HTTPError)
        message = str(error) or type(error).__name__
        if silent:
            ranks = ", ".join(map(str, self._ranks[peer]))
            message = f"{peer.name} (rank {ranks}) did not answer: {message}"
        fault = self.faults.get(peer.name) or Fault(message, silent, self.reached())
        self.faults[peer.name] = replace(fault, silent=fault.silent or silent)
        with contextlib.suppress(InvalidStateError):
            self.failing.set_result(None)

    def _failed(self, peer: Peer) -> bool:
        return peer.name in self.faults

    def _silent(self, peer: Peer) -> bool:
        return self._failed(peer) and self.faults[peer.name].silent

    def __str__(self) -> str:
        """What went wrong, for a sentence that ends in "failed"."""
        reached = next((fault.reached for fault in self.faults.values() if fault.reached), "")
        silent = sorted(name for name, fault in self.faults.items() if fault.silent)
        among = f"; no answer from {', '.join(silent)}" if silent else ""
        reasons = "; ".join(dict.fromkeys(fault.message for fault in self.faults.values()))
        return f"{f' by {reached}' if reached else ''}: {reasons}{among}"
