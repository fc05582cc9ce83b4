"""One server of a fleet, looked after for as long as the fleet lives.

What happens to the server is reported to its `Health`, and its state says what to do next: wait until it
answers, bring it to the current weights, probe it, or kill it and start another process in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from spell_megatron.config import ServersConfig
from spell_megatron.rollout.address import Address
from spell_megatron.rollout.client import Client, TurnedAway, Unavailable
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.health import (
    Answered,
    Event,
    Exited,
    Failed,
    GivenUp,
    Health,
    Limits,
    Ready,
    Restarted,
    State,
    after,
)
from spell_megatron.rollout.keeping import Keeping
from spell_megatron.rollout.server import Launch, Server

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
"""Between two looks at a server that starts."""
_PROBE_EVERY = 5.0
"""Seconds between two probes of a server that serves."""
_ALARMING = (State.DEAD, State.SUSPECT, State.LOST)


@dataclass(frozen=True, slots=True)
class FleetContext:
    """What a member needs of its fleet."""

    servers: ServersConfig
    limits: Limits
    bring_up_to_date: Callable[[Member], Awaitable[None]]
    """Give it the target version."""
    on_change: Callable[[], Awaitable[None]]
    """Its state is another one."""
    room: asyncio.Event
    """Set while a new process may take its share of the device's memory: not while the trainer has it."""


class Member:
    """A server of ours (`launch`), or one that somebody else started at `address` and perhaps keeps up (`keeping`).

    Belongs to the event loop that it was made in.
    """

    def __init__(
        self,
        name: str,
        health: Health,
        fleet: FleetContext,
        *,
        address: Address | None = None,
        launch: Launch | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.name, self.health, self.launch, self._keeping = name, health, launch, keeping
        self.world_size = 1
        self.incarnation = 0
        """Number of the process, of those that had this name."""
        self.server: Server | None = None
        self.client = Client(address or Address(""), fleet.servers.request_seconds)
        self._fleet = fleet
        self._changed = asyncio.Event()

    async def tend(self) -> None:
        """Do what the state asks for, until the member is lost."""
        steps: dict[State, Callable[[], Awaitable[None]]] = {
            State.DEAD: self._restart,
            State.STARTING: self._await_ready,
            State.SYNCING: lambda: self._fleet.bring_up_to_date(self),
            State.HEALTHY: self._probe,
            State.SUSPECT: self._probe,
            State.ASLEEP: self._rest,
        }
        while self.health.state is not State.LOST:
            try:
                await steps[self.health.state]()
            except Exception:
                _log.exception("%s: looking after it failed", self.name)
                await self.happened(Exited())
                await asyncio.sleep(_POLL_SECONDS)

    async def happened(self, event: Event) -> None:
        before, self.health = self.health, after(self.health, event, self._fleet.limits)
        if self.health.state is before.state:
            return
        level = logging.WARNING if self.health.state in _ALARMING else logging.INFO
        _log.log(level, "%s: %s -> %s", self.name, before.state.value, self.health.state.value)
        self._changed.set()
        await self._fleet.on_change()

    async def start(self) -> None:
        """Start a new process; there is none to start for a server that is somebody else's."""
        self.incarnation += 1
        address = self.client.address
        if self.launch is not None:
            starting = asyncio.ensure_future(asyncio.to_thread(Server.start, self.launch))
            try:
                self.server = await asyncio.shield(starting)
            except asyncio.CancelledError:  # the thread is not: what it starts is to be stopped
                with contextlib.suppress(Exception):
                    self.server = await starting
                raise
            address = self.server.address
        await self.client.close()  # what one that hangs has not answered is asked elsewhere
        self.client = Client(address, self._fleet.servers.request_seconds)

    async def stop(self, unheard: bool = False) -> None:
        """End the process, if it is ours, or have it ended by who keeps it; with `unheard` one that does not listen
        yet, too."""
        if self.server is not None:
            await asyncio.to_thread(self.server.stop)
            self.server = None
        elif (
            self._keeping is not None
            and (unheard or await self.client.listens())
            and not await self._keeping.end()
        ):
            _log.warning("%s was to be ended on its node, and nobody did so in time", self.name)

    async def close(self) -> None:
        """What others keep up goes on, and ends with the job."""
        self._keeping = None
        await self.stop()
        await self.client.close()

    async def wait_for_change(self, seconds: float = _POLL_SECONDS) -> None:
        """Wait for another state, no longer than so."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def fault(self) -> str:
        """What is known about its end."""
        return self.server.tail() if self.server else f"it answers at {self.client.address}, or should"

    async def _restart(self) -> None:
        await self.stop()
        await self._fleet.room.wait()
        await self.happened(Restarted())
        if self.health.state is State.STARTING:
            await self.start()
        elif self.health.state is State.LOST and self._keeping is not None:  # nobody puts it to sleep
            self._keeping.give_up()

    async def _await_ready(self) -> None:
        servers = self._fleet.servers
        try:
            async with asyncio.timeout(servers.start_seconds):
                while self.health.state is State.STARTING:
                    if self.server is not None and not self.server.running():
                        _log.warning("%s ended before it was ready; %s", self.name, self.server.tail())
                        break
                    if self._keeping is not None and self._keeping.given_up:
                        _log.warning("%s is given up on its node; its log there says more", self.name)
                        return await self.happened(GivenUp())
                    try:
                        await self.client.version(servers.probe_seconds)
                        self.world_size = await self.client.world_size(servers.probe_seconds)
                        return await self.happened(Ready())
                    except TurnedAway as error:  # by whatever has the place: ours will not come there
                        _log.warning("%s: %s", self.name, error)
                        break
                    except Unavailable:
                        pass
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            _log.warning("%s was not ready in %.0f s", self.name, servers.start_seconds)
        await self.happened(Exited())

    async def _rest(self) -> None:
        """Leave it alone, as long as it lives."""
        await self.wait_for_change()
        if self.health.state is State.ASLEEP and self.server is not None and not self.server.running():
            await self.happened(Exited())

    async def _probe(self) -> None:
        await self.wait_for_change(_PROBE_EVERY)
        if self.health.state not in (State.HEALTHY, State.SUSPECT):
            return
        if self.server is not None and not self.server.running():
            return await self.happened(Exited())
        held = self.health.held
        try:
            answer = await self.client.version(self._fleet.servers.probe_seconds)
        except EngineError as error:
            _log.warning("%s: %s", self.name, error)
            return await self.happened(Failed())
        if self.health.held == held and answer != str(held):
            _log.warning("%s holds version %s instead of %s", self.name, answer, held)
            return await self.happened(Exited())
        await self.happened(Answered())
