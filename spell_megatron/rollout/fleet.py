"""A fleet of vLLM servers behind the `Engine` contract.

A thread with an event loop of its own looks after the servers, whatever the trainer does meanwhile: one
task a server starts it, probes it, kills and restarts it, and brings a restarted one to the current
weights, as `health` says. Requests go where `dispatch` sends them, and are asked again elsewhere when
their server fails; seeds are part of the request, so a replayed one is the same draw.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from spell_megatron.config import Rollout as Settings
from spell_megatron.rollout import backend
from spell_megatron.rollout.client import Aborted, Client, Unavailable
from spell_megatron.rollout.dispatch import Dispatcher
from spell_megatron.rollout.engine import EngineError, EngineStats, check_version, room_for
from spell_megatron.rollout.health import (
    Answered,
    Event,
    Exited,
    Failed,
    Health,
    Limits,
    NewVersion,
    Ready,
    Restarted,
    State,
    Synced,
    SyncFailed,
    after,
)
from spell_megatron.rollout.model_files import stop_tokens
from spell_megatron.rollout.server import Launch, Server
from spell_megatron.rollout.transfer.manifest import Manifest
from spell_megatron.types import Rollout, Tokens

if TYPE_CHECKING:
    from spell_megatron.rollout.transfer.session import Sender

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
"""Between two looks at a server that starts."""
_PROBE_EVERY = 5.0
"""Seconds between two probes of a server that serves."""
Result = TypeVar("Result")


@dataclass(eq=False)
class _Member:
    """One engine of the fleet: a server of ours (`launch`), or one that somebody else started."""

    name: str
    client: Client
    health: Health
    launch: Launch | None = None
    server: Server | None = None
    world_size: int = 1
    incarnation: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def fault(self) -> str:
        return self.server.tail() if self.server else f"it answers at {self.client.url}, or should"


class Fleet:
    """An `Engine` of many servers.

    `logs` is a folder that receives one log file a server; the other arguments are InProcessEngine's.
    Returns when every server serves or is lost; raises EngineError where none serves.
    """

    def __init__(
        self,
        model: Path | str,
        settings: Settings,
        *,
        scratch: Path,
        logs: Path,
        stop: Sequence[int] | None = None,
        version: int = 0,
    ) -> None:
        folder, servers = Path(model), settings.servers
        if not servers.count and not servers.urls:
            raise EngineError("a fleet needs servers: set rollout.servers.count or rollout.servers.urls")
        self._settings = settings
        self._servers = servers
        self._stop = list(stop if stop is not None else stop_tokens(folder))
        self._version = self._first_version = version
        self._limits = Limits(restarts=servers.max_restarts)
        self._dispatcher = Dispatcher(settings.max_num_seqs)
        self._counted = EngineStats()
        self._waiting = 0
        self._fault = ""
        self._manifest = Manifest.of(folder)
        self._scratch = scratch
        launch = Launch(folder, settings, scratch, logs, backend.transfer(servers.transfer))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._transfers, self._serving = asyncio.Lock(), asyncio.Condition()
        self._members: list[_Member] = []
        self._tending: list[asyncio.Task[None]] = []
        try:
            self._run(self._open(launch))
            self._run(self._all_settled())
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        return self._version

    async def generate(
        self, prompt: Tokens, *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Rollout]:
        self._check_alive()
        budget = room_for(prompt, max_tokens, self._settings.max_model_len)

        async def group() -> list[Rollout]:
            running = [
                asyncio.create_task(self._complete(prompt, seed, budget, temperature, top_p))
                for seed in seeds
            ]
            try:
                return await asyncio.gather(*running)
            finally:
                for task in running:
                    task.cancel()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(group(), self._loop))

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `Engine`. Gathers in the calling thread, where the trainer's collectives belong.

        Engines that fail are left to be restarted and brought to the new version; returns as soon as one
        engine serves it.
        """
        check_version(self._version, version)
        self._run(self._transfers.acquire())
        try:
            self._version = version
            self._sender.store.offer(weights)
            members = self._run(self._retarget(version))
            outcome = self._send(members)
            self._sender.store.keep(version)
            self._run(self._conclude(members, version, outcome))
        except BaseException:
            self._fault = f"the update to version {version} did not finish"
            raise
        finally:
            self._loop.call_soon_threadsafe(self._transfers.release)
        self._fault = ""
        self._run(self._one_serves())

    def stats(self) -> EngineStats:
        return replace(self._counted, running=self._dispatcher.running(), waiting=self._waiting)

    def states(self) -> dict[str, Health]:
        """Health of every engine, by name."""
        return {member.name: member.health for member in self._members}

    def process_groups(self) -> dict[str, int]:
        """Process groups of the servers that this fleet started, by name."""
        return {member.name: member.server.group for member in self._members if member.server}

    def sleep(self) -> None:
        if backend.current().sleeps:
            self._run(self._everywhere("/sleep?level=1"))

    def wake(self) -> None:
        if backend.current().sleeps:
            self._run(self._everywhere("/wake_up"))

    def healthy(self) -> bool:
        return not self._fault and any(member.health.serves for member in self._members)

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._fault = "the fleet is closed"
        self._run(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if "_sender" in vars(self):
            self._sender.close()

    @cached_property
    def _sender(self) -> Sender:
        """Made for the first transfer: it takes vLLM into this process."""
        backend.quiet()
        with backend.undisturbed(self._scratch):
            from spell_megatron.rollout.transfer.session import Sender

            return Sender(self._manifest, self._servers)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run in the fleet's loop and wait, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # Everything below runs in the fleet's loop.

    async def _open(self, launch: Launch) -> None:
        count, tensor = self._servers.count, self._servers.tensor
        on_cpu = backend.current() is backend.CPU
        for index in range(count):
            devices = () if on_cpu else tuple(range(index * tensor, (index + 1) * tensor))
            threads = max(1, len(os.sched_getaffinity(0)) // (count * tensor)) if on_cpu else None
            log = launch.log / f"engine-{index}.log"
            own = replace(launch, log=log, devices=devices, threads=threads)
            self._members.append(self._member(f"engine-{index}", "", own))
            await self._launch(self._members[-1])
        for index, url in enumerate(self._servers.urls):
            self._members.append(self._member(f"remote-{index}", url.rstrip("/"), None))
        self._tending = [asyncio.create_task(self._tend(member)) for member in self._members]

    def _member(self, name: str, url: str, launch: Launch | None) -> _Member:
        return _Member(name, Client(url, self._servers.request_seconds), Health(self._version), launch)

    async def _tend(self, member: _Member) -> None:
        """Do what the member's state asks for, for ever."""
        steps: dict[State, Callable[[_Member], Awaitable[None]]] = {
            State.DEAD: self._restart,
            State.STARTING: self._await_ready,
            State.SYNCING: self._bring_up_to_date,
            State.HEALTHY: self._probe,
            State.SUSPECT: self._probe,
        }
        while member.health.state is not State.LOST:
            try:
                await steps[member.health.state](member)
            except Exception:
                _log.exception("%s: looking after it failed", member.name)
                await self._happened(member, Exited())
                await asyncio.sleep(_POLL_SECONDS)

    async def _happened(self, member: _Member, event: Event) -> None:
        before, member.health = member.health, after(member.health, event, self._limits)
        if member.health.state is before.state:
            return
        level = (
            logging.WARNING
            if member.health.state in (State.DEAD, State.SUSPECT, State.LOST)
            else logging.INFO
        )
        _log.log(level, "%s: %s -> %s", member.name, before.state.value, member.health.state.value)
        member.changed.set()
        async with self._serving:
            self._serving.notify_all()

    async def _restart(self, member: _Member) -> None:
        if member.server is not None:
            await asyncio.to_thread(member.server.stop)
            member.server = None
        await self._happened(member, Restarted())
        if member.health.state is State.STARTING:
            await self._launch(member)

    async def _launch(self, member: _Member) -> None:
        """Start a new process; there is none to start for a server that is somebody else's."""
        member.incarnation += 1
        if member.launch is not None:
            member.server = await asyncio.to_thread(Server.start, member.launch)
            await member.client.close()
            member.client = Client(member.server.url, self._servers.request_seconds)

    async def _await_ready(self, member: _Member) -> None:
        try:
            async with asyncio.timeout(self._servers.start_seconds):
                while True:
                    if member.server is not None and not member.server.running():
                        _log.warning("%s ended before it was ready; %s", member.name, member.server.tail())
                        break
                    with contextlib.suppress(Unavailable):
                        await member.client.version(self._servers.probe_seconds)
                        member.world_size = await member.client.world_size(self._servers.probe_seconds)
                        return await self._happened(member, Ready())
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            _log.warning("%s was not ready in %.0f s", member.name, self._servers.start_seconds)
        await self._happened(member, Exited())

    async def _bring_up_to_date(self, member: _Member) -> None:
        async with self._transfers:
            if member.health.state is not State.SYNCING:
                return
            version = member.health.target
            if version == self._first_version:  # the weights of the folder that it started from
                if member.launch is None:
                    _log.info("%s is trusted to hold version %d", member.name, version)
                try:
                    await member.client.post(
                        "/update_weight_version", self._servers.sync_seconds, new_version=str(version)
                    )
                    return await self._happened(member, Synced(version))
                except Unavailable as error:
                    _log.warning("%s: %s", member.name, error)
                    return await self._happened(member, SyncFailed())
            if self._sender.store.version == version:
                outcome = await asyncio.to_thread(self._send, [member])
                return await self._conclude([member], version, outcome)
        await self._wait_for_change(member, _POLL_SECONDS)  # an update that failed: another will come

    def _send(self, members: Sequence[_Member]) -> EngineError | None:
        """Transfer to `members`; the error, if any, is for `_conclude`. Runs outside the fleet's loop."""
        from spell_megatron.rollout.transfer.session import Peer, TransferError

        if not members:
            return None
        try:
            self._sender.send(
                [Peer(m.name, m.client.url, m.world_size, m.incarnation) for m in members], self._version
            )
        except TransferError as error:
            return error
        return None

    async def _retarget(self, version: int) -> list[_Member]:
        """Announce a version; returns the members that can receive it."""
        self._dispatcher.forget()
        for member in self._members:
            await self._happened(member, NewVersion(version))
        return [member for member in self._members if member.health.state is State.SYNCING]

    async def _conclude(self, members: Sequence[_Member], version: int, error: EngineError | None) -> None:
        culprits: frozenset[str] = getattr(error, "culprits", frozenset())
        if error is not None:
            _log.warning("%s", error)
        for member in members:
            if error is None:
                await self._happened(member, Synced(version))
            else:
                await self._happened(member, Exited() if member.name in culprits else SyncFailed())

    async def _probe(self, member: _Member) -> None:
        await self._wait_for_change(member, _PROBE_EVERY)
        if member.health.state not in (State.HEALTHY, State.SUSPECT):
            return
        if member.server is not None and not member.server.running():
            return await self._happened(member, Exited())
        held = member.health.held
        try:
            answer = await member.client.version(self._servers.probe_seconds)
        except EngineError as error:
            _log.warning("%s: %s", member.name, error)
            return await self._happened(member, Failed())
        if member.health.held == held and answer != str(held):
            _log.warning("%s holds version %s instead of %s", member.name, answer, held)
            return await self._happened(member, Exited())
        await self._happened(member, Answered())

    @staticmethod
    async def _wait_for_change(member: _Member, seconds: float) -> None:
        member.changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await member.changed.wait()

    async def _complete(
        self, prompt: Tokens, seed: int, max_tokens: int, temperature: float, top_p: float
    ) -> Rollout:
        """One completion, asked again elsewhere for as long as servers fail it."""
        for attempt in itertools.count():
            async with self._assigned(prompt) as member:
                incarnation = member.incarnation
                try:
                    completion = await member.client.complete(
                        prompt,
                        seed=seed,
                        max_tokens=max_tokens,
                        temperature=temperature,
                        top_p=top_p,
                        stop=self._stop,
                    )
                except Aborted:
                    continue
                except Unavailable as error:
                    _log.debug("%s: attempt %d failed: %s", member.name, attempt + 1, error)
                    # Of many requests that fail at once only the first counts; probes decide the rest.
                    if member.incarnation == incarnation and member.health.serves:
                        _log.warning("%s", error)
                        await self._happened(member, Failed())
                    continue
            rollout = completion.rollout
            self._counted = replace(
                self._counted,
                prompt_tokens=self._counted.prompt_tokens + len(prompt),
                cached_tokens=self._counted.cached_tokens + completion.cached_tokens,
                generated_tokens=self._counted.generated_tokens + len(rollout.tokens),
            )
            return rollout
        raise AssertionError("unreachable")

    @contextlib.asynccontextmanager
    async def _assigned(self, prompt: Tokens) -> AsyncIterator[_Member]:
        """An engine for a request, as soon as one has room."""
        self._waiting += 1
        try:
            name = await self._free_engine(prompt)
        finally:
            self._waiting -= 1
        try:
            yield next(member for member in self._members if member.name == name)
        finally:
            self._dispatcher.finished(name)
            async with self._serving:
                self._serving.notify_all()

    async def _free_engine(self, prompt: Tokens) -> str:
        async with self._serving:
            while True:
                self._check_alive()
                serving = [member.name for member in self._members if member.health.serves]
                name = self._dispatcher.choose(prompt, serving)
                if name is not None:
                    return name
                await self._serving.wait()

    def _check_alive(self) -> None:
        """Raise where waiting is in vain."""
        if self._fault:
            raise EngineError(f"the fleet cannot generate: {self._fault}")
        if all(member.health.state is State.LOST for member in self._members):
            faults = "\n".join(f"{member.name}: {member.fault()}" for member in self._members)
            raise EngineError(f"all {len(self._members)} engines are lost\n{faults}")

    async def _one_serves(self) -> None:
        async with self._serving:
            while not any(member.health.serves for member in self._members):
                self._check_alive()
                await self._serving.wait()

    async def _all_settled(self) -> None:
        """Wait for every engine to serve or to be lost; raise if none serves."""
        async with self._serving:
            while not all(
                member.health.serves or member.health.state is State.LOST for member in self._members
            ):
                await self._serving.wait()
        self._check_alive()

    async def _everywhere(self, path: str) -> None:
        members = [member for member in self._members if member.health.serves]
        await asyncio.gather(*(member.client.post(path, self._servers.sync_seconds) for member in members))

    async def _shut_down(self) -> None:
        async with self._serving:
            self._serving.notify_all()
        for task in self._tending:
            task.cancel()
        await asyncio.gather(*self._tending, return_exceptions=True)
        servers = [member.server for member in self._members if member.server is not None]
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in servers))
        for member in self._members:
            await member.client.close()
