"""A fleet of vLLM servers behind the `Engine` contract.

A thread with an event loop of its own looks after the servers, whatever the trainer does meanwhile: one
task a server starts it, probes it, kills and restarts it, and brings a restarted one to the current
weights, as `health` says. Requests go where `dispatch` sends them, and are asked again elsewhere when
their server fails; seeds are part of the request, so a replayed one is the same draw.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from spell_megatron.base.secret import read_secret
from spell_megatron.base.topology import LOCAL, Topology
from spell_megatron.config import Config
from spell_megatron.config import RolloutConfig as Settings
from spell_megatron.rollout import backend, dialect
from spell_megatron.rollout.address import Address
from spell_megatron.rollout.client import Aborted, Unavailable, allow_connections
from spell_megatron.rollout.dispatch import Dispatcher
from spell_megatron.rollout.engine import (
    EngineError,
    EngineStats,
    Memory,
    WeightsWanted,
    check_version,
    room_for,
)
from spell_megatron.rollout.experts import PromptExperts
from spell_megatron.rollout.health import (
    Evicted,
    Exited,
    Failed,
    Health,
    Limits,
    NewVersion,
    Slept,
    State,
    Synced,
    SyncFailed,
    Woke,
)
from spell_megatron.rollout.keeping import Keeping
from spell_megatron.rollout.member import FleetContext, Member
from spell_megatron.rollout.server import Launch
from spell_megatron.rollout.transfer.manifest import Manifest
from spell_megatron.types import Rollout, Tokens
from tokenizer.ends import end_tokens

if TYPE_CHECKING:
    from spell_megatron.rollout.transfer.fanout import Peer
    from spell_megatron.rollout.transfer.session import Faults, Sender

_log = logging.getLogger(__name__)
_ATTEMPTS = 20
"""Servers may fail a request so often; one that every server fails would otherwise be asked for ever."""
_UP = (State.SYNCING, State.HEALTHY, State.SUSPECT, State.ASLEEP)
Result = TypeVar("Result")


class Fleet:
    """An `Engine` of many servers.

    `logs` is a folder that receives one log file a server; `found` says where they are, and follows from the settings
    where it is not given; `sleeps`, whether they can give memory back, follows from that. `keeping` leads to who keeps
    the server at a URL of the settings. The other arguments are InProcessEngine's. Returns when every server serves or
    is lost; raises EngineError where none serves.
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
        found: Topology | None = None,
        sleeps: bool | None = None,
        tells_experts: bool = False,
        keeping: Callable[[str], Keeping] | None = None,
    ) -> None:
        folder, servers = Path(model), settings.servers
        found = found or backend.here(Config(rollout=settings))
        self._seats = found.servers(0)
        if not self._seats and not servers.urls:
            raise EngineError(
                "a fleet needs servers: set rollout.servers.count, or rollout.servers.urls to those that somebody"
                " else starts (for cluster.engine_nodes, `spell-megatron launch` does)"
            )
        self._settings = settings
        self._servers = servers
        self._secret = read_secret(Path(servers.secret_file)) if servers.secret_file else ""
        self._sleeps = (found.colocated and backend.current().sleeps) if sleeps is None else sleeps
        self._stop = list(stop if stop is not None else end_tokens(folder))
        self._version = self._first_version = version
        self._dispatcher = Dispatcher(settings.max_num_seqs)
        self._counted = EngineStats()
        self._waiting = 0
        self._fault = ""
        self._updating = False
        self._transfer = found.transfer
        self._local = found.transfer in LOCAL
        self._manifest = Manifest.of(folder)
        self._scratch = scratch
        self._experts = PromptExperts() if tells_experts else None
        launch = Launch(
            folder, settings, scratch, logs, found.transfer, sleeps=self._sleeps, tells_experts=tells_experts
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._transfers, self._serving, self._room = asyncio.Lock(), asyncio.Condition(), asyncio.Event()
        self._room.set()
        self._keeping = keeping
        allow_connections((len(self._seats) + len(servers.urls)) * settings.max_num_seqs)
        self._members: list[Member] = []
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

        Engines that fail are left to be restarted, and are brought to the new version then where the weights are kept;
        who generates waits for the first. Where they are not kept, who generates is told.
        """
        if not (self._local and version == self._version):  # which may come again, for those that lack it
            check_version(self._version, version)
        self._run(self._transfers.acquire())
        self._updating = True
        try:
            self._version = version
            members = self._run(self._retarget(version))
            faults = self._sender.update(_peers(members), version, weights)
            self._run(self._conclude(members, version, faults))
        except BaseException:
            self._run(self._serve_nothing(f"the update to version {version} did not finish"))
            raise
        finally:
            self._updating = False
            self._loop.call_soon_threadsafe(self._transfers.release)
        self._fault = ""

    def stats(self) -> EngineStats:
        return replace(self._counted, running=self._dispatcher.running(), waiting=self._waiting)

    def states(self) -> dict[str, Health]:
        """Health of every engine, by name."""
        return {member.name: member.health for member in self._members}

    def process_groups(self) -> dict[str, int]:
        """Process groups of the servers that this fleet started, by name."""
        return {member.name: member.server.group for member in self._members if member.server}

    def sleep(self, keep: bool = True) -> None:
        if self._sleeps:
            self._run(self._lie_down(keep or self._manifest.mixture))

    def wake(self, memory: Memory) -> None:
        if self._sleeps:
            self._run(self._get_up(memory))

    def healthy(self) -> bool:
        return not self._fault and any(member.health.serves for member in self._members)

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self._serve_nothing("the fleet is closed"))
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
            from spell_megatron.rollout.transfer.session import sender

            return sender(self._manifest, self._servers, self._transfer)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run in the fleet's loop and wait, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # Everything below runs in the fleet's loop.

    async def _open(self, launch: Launch) -> None:
        limits = Limits(restarts=self._servers.max_restarts)
        context = FleetContext(self._servers, limits, self._bring_up_to_date, self._notify, self._room)
        on_cpu = backend.current() is dialect.CPU
        workers = len(self._seats) * self._servers.tensor
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, workers)) if on_cpu else None
        for index, seat in enumerate(self._seats):
            own = replace(launch, log=launch.log / f"engine-{index}.log", devices=seat.gpus, threads=threads)
            member = Member(f"engine-{index}", Health(self._version), context, launch=own)
            self._members.append(member)
            await member.start()
        for index, url in enumerate(self._servers.urls):
            address = Address(url.rstrip("/"), secret=self._secret)
            keeping = self._keeping(address.url) if self._keeping else None
            member = Member(
                f"remote-{index}", Health(self._version), context, address=address, keeping=keeping
            )
            self._members.append(member)
        self._tending = [asyncio.create_task(member.tend()) for member in self._members]

    async def _bring_up_to_date(self, member: Member) -> None:
        async with self._transfers:
            if not member.health.receives:
                return await member.wait_for_change()
            version = member.health.target
            if version == self._first_version:  # the weights of the folder that it started from
                if member.health.blank:
                    return await member.happened(Exited())
                if member.launch is None:
                    _log.info("%s is trusted to hold version %d", member.name, version)
                try:
                    await member.client.post(
                        dialect.Route.NAME_WEIGHTS, self._servers.sync_seconds, new_version=str(version)
                    )
                    return await member.happened(Synced(version))
                except Unavailable as error:
                    _log.warning("%s: %s", member.name, error)
                    return await member.happened(SyncFailed())
            faults = await asyncio.to_thread(self._sender.repeat, _peers([member]), version)
            if faults is not None:
                return await self._conclude([member], version, faults)
        await member.wait_for_change()  # not kept, or incomplete: another update will come

    async def _retarget(self, version: int) -> list[Member]:
        """Announce a version; returns the members that can receive it."""
        self._dispatcher.forget()
        for member in self._members:
            await member.happened(NewVersion(version))
        if self._experts:  # who was asked before now, by old weights, enters its experts into the one before
            self._experts = PromptExperts()
        return [member for member in self._members if member.health.receives]

    async def _conclude(self, members: Sequence[Member], version: int, faults: Faults) -> None:
        for member in members:
            fault = faults.get(member.name)
            if fault is None:
                await member.happened(Synced(version))
            else:
                await member.happened(Exited() if fault.silent else SyncFailed())

    async def _complete(
        self, prompt: Tokens, seed: int, max_tokens: int, temperature: float, top_p: float
    ) -> Rollout:
        """One completion, asked again elsewhere when a server fails it."""
        faults: list[str] = []
        while len(faults) < _ATTEMPTS:
            async with self._assigned(prompt) as member:
                incarnation, experts = member.incarnation, self._experts
                known = experts.of(prompt) if experts else None
                first = len(prompt) if known is not None else 0
                try:
                    completion = await member.client.complete(
                        prompt,
                        seed=seed,
                        max_tokens=max_tokens,
                        temperature=temperature,
                        top_p=top_p,
                        stop=self._stop,
                        experts_from=first if experts else None,
                    )
                except Aborted as error:
                    faults.append(f"{member.name}: {error}")
                    continue
                except Unavailable as error:
                    faults.append(f"{member.name}: {error}")
                    # Of many requests that fail at once only the first counts; probes decide the rest.
                    if member.incarnation == incarnation and member.health.serves:
                        _log.warning("%s", faults[-1])
                        await member.happened(Failed())
                    continue
            rollout = completion.rollout
            if experts:
                told = experts.split(prompt, known, completion.experts, len(rollout.tokens))
                rollout = replace(rollout, prompt_experts=told[0], experts=told[1])
            self._counted = replace(
                self._counted,
                prompt_tokens=self._counted.prompt_tokens + len(prompt),
                cached_tokens=self._counted.cached_tokens + completion.cached_tokens,
                generated_tokens=self._counted.generated_tokens + len(rollout.tokens),
            )
            return rollout
        raise EngineError(
            f"a request of {len(prompt)} tokens failed {_ATTEMPTS} times, at last on {faults[-1]}; the engines'"
            " logs say more"
        )

    @contextlib.asynccontextmanager
    async def _assigned(self, prompt: Tokens) -> AsyncIterator[Member]:
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
            await self._notify()

    async def _free_engine(self, prompt: Tokens) -> str:
        async with self._serving:
            while True:
                self._check_alive()
                serving = [member.name for member in self._members if member.health.serves]
                name = self._dispatcher.choose(prompt, serving)
                if name is not None:
                    return name
                await self._serving.wait()

    async def _notify(self) -> None:
        """Wake those who wait for an engine."""
        async with self._serving:
            self._serving.notify_all()

    async def _serve_nothing(self, fault: str) -> None:
        """Tell everybody who waits, or asks from now on, why there is nothing to wait for."""
        self._fault = fault
        await self._notify()

    def _check_alive(self) -> None:
        """Raise where waiting is in vain."""
        if self._fault:
            raise EngineError(f"the fleet cannot generate: {self._fault}")
        if all(member.health.state is State.LOST for member in self._members):
            faults = "\n".join(f"{member.name}: {member.fault()}" for member in self._members)
            raise EngineError(f"all {len(self._members)} engines are lost\n{faults}")
        if self._hungry():
            raise WeightsWanted(f"no engine holds the weights of version {self._version}: send them again")

    def _hungry(self) -> bool:
        """Whether whoever lives waits for weights that nobody kept."""
        living = {member.health.state for member in self._members} - {State.LOST}
        told = self._version != self._first_version and not self._updating
        return self._local and told and living == {State.SYNCING}

    async def _all_settled(self) -> None:
        """Wait for every engine to serve or to be lost; raise if none serves."""
        async with self._serving:
            while not all(
                member.health.serves or member.health.state is State.LOST for member in self._members
            ):
                await self._serving.wait()
        self._check_alive()

    async def _lie_down(self, keep: bool) -> None:
        """Nobody has memory when this returns, and nobody starts before all have woken.

        Who does not go to sleep is stopped: one that is on its way, and one that fails to. A server of somebody else's
        that nobody keeps cannot be stopped; the log names it.
        """
        self._room.clear()
        async with self._transfers:  # none is under way
            await asyncio.gather(*(self._put_to_sleep(member, keep) for member in self._members))

    async def _put_to_sleep(self, member: Member, keep: bool) -> None:
        state = member.health.state
        if state in _UP:
            level = dialect.KEEPS if keep else dialect.DISCARDS
            if await self._told(member, f"{dialect.Route.SLEEP}?level={level}"):
                return await member.happened(Slept(keep))
        if state is not State.LOST:
            await member.happened(Evicted() if state is State.STARTING else Exited())
            await member.stop(unheard=True)

    async def _get_up(self, memory: Memory) -> None:
        """A part of the memory is the engines' again. The scheduler goes on with the last part, not before: a request
        would touch what is not there."""
        await asyncio.gather(*(self._wake(member, memory) for member in self._members))
        if memory == "cache":  # which comes last: the trainer has left
            self._room.set()

    async def _wake(self, member: Member, memory: Memory) -> None:
        if memory not in member.health.asleep:
            return
        awake = await self._told(member, f"{dialect.Route.WAKE}?tags={dialect.SLEEP_TAGS[memory]}")
        if awake and len(member.health.asleep) == 1:
            awake = await self._told(member, dialect.Route.RESUME)
        if awake:
            await member.happened(Woke(memory))
        else:
            await member.happened(Exited())
            await member.stop()

    async def _told(self, member: Member, path: str) -> bool:
        """Whether it did as it was told."""
        try:
            await member.client.post(path, self._servers.sync_seconds)
        except EngineError as error:
            _log.warning("%s: %s: %s", member.name, path, error)
            return False
        return True

    async def _shut_down(self) -> None:
        for task in self._tending:
            task.cancel()
        await asyncio.gather(*self._tending, return_exceptions=True)
        await asyncio.gather(*(member.close() for member in self._members))


def _peers(members: Iterable[Member]) -> list[Peer]:
    from spell_megatron.rollout.transfer.fanout import Peer

    return [
        Peer(m.name, m.client.address, m.world_size, m.incarnation, asleep=bool(m.health.asleep))
        for m in members
    ]
