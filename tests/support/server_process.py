"""What is behind an engine server that was started, for tests of who keeps servers up: it runs until it is ended."""

from __future__ import annotations

from spell_megatron.rollout.address import Address


class ServerProcess:
    group = 0

    def __init__(self, url: str = "http://engine") -> None:
        self.address, self.alive = Address(url), True

    def running(self) -> bool:
        return self.alive

    def stop(self) -> None:
        self.alive = False

    def tail(self) -> str:
        return ""
