"""One weight update told to many servers at once.

vLLM's trainer engines speak to one inference server. `FanOut` lets them speak to many: it posts every call to
all of them at once, gives each server its own ranks in the transfer group, and remembers who did not answer,
so that a failure names its culprits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import httpx
from vllm.distributed.weight_transfer.base import WeightTransferUpdatePayload
from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

from spell_megatron.rollout.engine import EngineError

_GRACE_SECONDS = 10.0
"""A worker whose tensor did not come needs this long to say so after its own timeout."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine server that takes part. A restarted server is another peer."""

    name: str
    url: str
    world_size: int
    incarnation: int


class FanOut:
    """vLLM's weight-sync client (`VLLMWeightSyncClient`) for several servers at once.

    A call waits `timeout` seconds, and a little longer for a worker to say itself what did not come.
    """

    def __init__(self, peers: Sequence[Peer], version: int, timeout: float) -> None:
        self._peers = peers
        self._version = str(version)
        self._timeout = timeout + _GRACE_SECONDS
        self._clients = {peer: httpx.Client(base_url=peer.url, trust_env=False) for peer in peers}
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(peers)))
        self._unanswered: set[str] = set()
        ends = accumulate((peer.world_size for peer in peers), initial=0)
        self._ranks = {
            peer: range(start + 1, end + 1) for peer, (start, end) in zip(peers, pairwise(ends), strict=True)
        }

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def info(peer: Peer) -> dict[str, Any]:
            own = {"rank_offset": self._ranks[peer].start} if "rank_offset" in init_info else {}
            return {**init_info, **own}

        self._all(
            lambda peer: self._post(peer, "/init_weight_transfer_engine", json={"init_info": info(peer)})
        )

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        self.post("/update_weights", json={"update_info": _json_safe_update_payload(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", json={"weight_version": self._version})

    def greet(self) -> None:
        """See whether everybody is there, before anything waits for them, and refuse to go backwards.

        A fleet labels every server when it opens: a newer label is another trainer's.
        """

        def check(peer: Peer) -> None:
            held = self._held(peer)
            if held.isdecimal() and int(held) > int(self._version):
                raise EngineError(
                    f"{peer.name} ({peer.url}) holds version {held}, and {self._version} would take it back:"
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
        self.post("/collective_rpc", json={"method": "watch_weights"})

    def compare(self, sums: Mapping[str, int]) -> None:
        """Hold what every worker was given against what was sent."""

        def check(peer: Peer) -> None:
            answer = self._post(peer, "/collective_rpc", json={"method": "given_weights"})
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

    def _post(self, peer: Peer, path: str, timeout: float | None = None, **arguments: Any) -> Any:
        response = self._clients[peer].post(path, timeout=timeout or self._timeout, **arguments)
        if response.is_error:
            raise EngineError(f"{peer.name} answered {response.status_code} to {path}: {response.text[:300]}")
        return response.json() if response.content else None

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
                ranks = ", ".join(map(str, self._ranks[peer]))
                error = EngineError(
                    f"{peer.name} (rank {ranks}) did not answer: {str(error) or type(error).__name__}"
                )
            errors.append(error)
        if errors:
            raise errors[0]
