"""The fleet against servers that misbehave: imitations that answer as vLLM does, until told otherwise."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import resource
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from models import make_model
from server_process import ServerProcess

from spell_megatron.config import RolloutConfig as Settings
from spell_megatron.config import ServersConfig
from spell_megatron.rollout import keeping as keeping_module
from spell_megatron.rollout import member as member_module
from spell_megatron.rollout.address import Address
from spell_megatron.rollout.client import allow_connections
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.fleet import Fleet
from spell_megatron.rollout.health import Event, Evicted, Health, Limits, NewVersion, State
from spell_megatron.rollout.keeping import Keeping
from spell_megatron.rollout.member import FleetContext, Member
from spell_megatron.rollout.server import Launch
from spell_megatron.rollout.transfer.fanout import Fault as Unreached
from spell_megatron.rollout.transfer.fanout import Peer
from spell_megatron.types import Rollout

pytestmark = pytest.mark.unit

Fault = Callable[["Handler"], None]
Value = TypeVar("Value")
PATIENCE = 60.0
PATIENT = ServersConfig(probe_seconds=PATIENCE)


class FakeServer(ThreadingHTTPServer):
    """Answers with the seed as the only token. `faults` are used up one a completion."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.label = "default"
        self.faults: list[Fault] = []
        self.dead = False
        self.speaks, self.works = threading.Event(), threading.Event()
        self.speaks.set()
        self.works.set()
        self.calls: list[str] = []
        self.served: list[list[int]] = []
        self.tells_experts = False
        self.experts_from: list[int | None] = []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer
    experts: str | None = None

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.dead:
            return reset(self)
        self.server.speaks.wait(PATIENCE)
        self.reply({"weight_version": self.server.label, "world_size": 1})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.dead:
            return reset(self)
        if self.path == "/update_weight_version":
            self.server.label = body["new_version"]
            return self.reply({})
        if self.path.startswith(("/sleep", "/wake_up")):
            self.server.calls.append(self.path)
            return self.reply({})
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            fault = self.server.faults.pop(0) if self.server.faults else None
        try:
            time.sleep(0.01)  # so that requests meet
            self.server.works.wait(PATIENCE)
            if fault is not None:
                return fault(self)
            self.server.served.append(body["token_ids"])
            first = body["sampling_params"].get("routed_experts_prompt_start")
            self.server.experts_from.append(first)
            if self.server.tells_experts:
                self.experts = experts_of(body["token_ids"][first:])
            self.complete(body["sampling_params"]["seed"])
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def complete(self, token: int, finish: str = "length", versions: tuple[str, ...] = ()) -> None:
        spans = [{"version": v, "start": 0, "end": 1} for v in versions or (self.server.label,)]
        choice = {
            "finish_reason": finish,
            "token_ids": [token],
            "logprobs": {"content": [{"token_id": token, "logprob": -0.5}]},
            "weight_versions": spans,
            "routed_experts": self.experts,
        }
        usage = {"prompt_tokens_details": {"cached_tokens": 2}}
        self.reply({"choices": [choice], "usage": usage})

    def reply(self, body: Any, status: int = 200, raw: bytes | None = None) -> None:
        content = raw if raw is not None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def experts_of(tokens: list[int]) -> str:
    """Of one layer and one expert a token, whose number is the token's: an array as vLLM sends it."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(tokens, dtype=np.uint8).reshape(-1, 1, 1), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def error_500(handler: Handler) -> None:
    handler.reply({"error": "out of memory"}, status=500)


def reset(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def garbage(handler: Handler) -> None:
    handler.reply(None, raw=b"\x00 not json")


def nonsense(handler: Handler) -> None:
    handler.reply({"choices": []})


def no_tokens(handler: Handler) -> None:
    handler.complete(0.5)  # type: ignore[arg-type]


def aborted(handler: Handler) -> None:
    handler.complete(1, finish="abort")


def mixed(handler: Handler) -> None:
    handler.complete(1, versions=("0", "1"))


def gone(handler: Handler) -> None:
    handler.server.dead = True
    reset(handler)


def refused(handler: Handler) -> None:
    handler.reply({"error": "token out of vocabulary"}, status=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("model"))


@contextmanager
def fleet_of(
    folder: Path,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    settings: ServersConfig = PATIENT,
    tells_experts: bool = False,
    keeping: Callable[[str], Keeping] | None = None,
    **rollout: Any,
) -> Iterator[tuple[Fleet, list[FakeServer]]]:
    monkeypatch.setattr(member_module, "_PROBE_EVERY", 0.05)
    monkeypatch.setattr(member_module, "_POLL_SECONDS", 0.05)
    servers = [FakeServer() for _ in range(count)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    urls = tuple(server.url for server in servers)
    config = Settings(max_model_len=64, servers=replace(settings, urls=urls), **rollout)
    fleet = Fleet(
        folder,
        config,
        scratch=folder / "scratch",
        logs=folder / "logs",
        tells_experts=tells_experts,
        keeping=keeping,
    )
    try:
        yield fleet, servers
    finally:
        fleet.close()
        for server in servers:
            server.shutdown()
            server.server_close()


def sample(fleet: Fleet, groups: int = 1, seeds: int = 4) -> list[Rollout]:
    async def all_groups() -> list[list[Rollout]]:
        calls = (
            fleet.generate(
                [group + 1] * 20,
                seeds=[100 * group + i for i in range(seeds)],
                max_tokens=8,
                temperature=1.0,
                top_p=1.0,
            )
            for group in range(groups)
        )
        return await asyncio.gather(*calls)

    return [rollout for group in asyncio.run(all_groups()) for rollout in group]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("fault", [error_500, reset, garbage, nonsense, no_tokens, aborted, mixed])
def test_a_request_that_a_server_fails_is_asked_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    with fleet_of(folder, 2, monkeypatch) as (fleet, servers):
        for server in servers:
            server.faults = [fault] * 3
        rollouts = sample(fleet, groups=5)
        assert [rollout.tokens for rollout in rollouts] == [
            (100 * g + i,) for g in range(5) for i in range(4)
        ]
        assert all(rollout.version == 0 and rollout.logprobs == (-0.5,) for rollout in rollouts)
        assert fleet.stats().generated_tokens == 20  # a failed attempt counts for nothing
        assert fleet.stats().cached_tokens == 40
        wait_until(fleet.healthy)


def test_experts_of_a_prompt_are_asked_for_until_they_are_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fleet_of(folder, 1, monkeypatch, tells_experts=True, max_num_seqs=1) as (fleet, (server,)):
        with pytest.raises(EngineError, match="told nothing"):
            sample(fleet, seeds=1)
        server.tells_experts = True
        server.experts_from.clear()
        rollouts = sample(fleet, groups=2, seeds=3)
    assert sorted(server.experts_from) == [0, 0, 20, 20, 20, 20]
    for group, first in ((rollouts[:3], 1), (rollouts[3:], 2)):
        assert len({id(rollout.prompt_experts) for rollout in group}) == 1
        for rollout in group:
            assert rollout.prompt_experts is not None and rollout.experts is not None
            assert rollout.prompt_experts.ravel().tolist() == [first] * 20
            assert rollout.experts.shape == (0, 1, 1)  # of one token, which went through no layer


class Renaming:
    """Weights arrive at once, wherever they are sent."""

    def __init__(self, servers: list[FakeServer]) -> None:
        self.servers = servers

    def update(self, peers: list[Peer], version: int, weights: object) -> dict[str, Unreached]:
        time.sleep(0.1)  # for the answer to a probe that is under way
        for server in self.servers:
            server.label = str(version)
        return {}

    def close(self) -> None: ...


def test_experts_that_old_weights_chose_are_not_taken_for_the_new_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a request that is under way when the weights change."""
    with fleet_of(folder, 1, monkeypatch, tells_experts=True) as (fleet, (server,)):
        server.tells_experts = True
        vars(fleet)["_sender"] = Renaming([server])
        server.works.clear()
        under_way = Future[list[Rollout]]()
        threading.Thread(target=lambda: under_way.set_result(sample(fleet, seeds=1)), daemon=True).start()
        wait_until(lambda: server.at_once == 1)
        fleet.update_weights([], 1)
        server.works.set()
        old = under_way.result(PATIENCE)  # held: its experts are known for as long as it is
        new = sample(fleet, seeds=1)
        assert server.experts_from == [0, 0]
        assert old[0].prompt_experts is not new[0].prompt_experts


def test_a_server_that_has_not_heard_of_new_weights_enters_its_experts_with_the_old_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked between the announcement to the server before it and its own."""
    happened = Member.happened
    old: list[Rollout] = []

    async def asked(member: Member, event: Event) -> None:
        await happened(member, event)
        if isinstance(event, NewVersion) and not old:
            old.append(await fleet._complete([1] * 20, 0, 8, 1.0, 1.0))

    with fleet_of(folder, 2, monkeypatch, tells_experts=True) as (fleet, servers):
        for server in servers:
            server.tells_experts = True
        vars(fleet)["_sender"] = Renaming(servers)
        monkeypatch.setattr(Member, "happened", asked)
        fleet.update_weights([], 1)
        assert old[0].version == 0
        (new,) = sample(fleet, seeds=1)
        assert sorted(first for server in servers for first in server.experts_from) == [0, 0]
        assert old[0].prompt_experts is not new.prompt_experts


def test_a_wrong_request_is_not_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet_of(folder, 1, monkeypatch) as (fleet, (server,)):
        server.faults = [refused]
        with pytest.raises(EngineError, match="out of vocabulary"):
            sample(fleet)
        assert fleet.healthy()
        assert len(sample(fleet)) == 4


def test_a_group_goes_to_one_server_and_groups_to_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet_of(folder, 2, monkeypatch) as (fleet, servers):
        sample(fleet, groups=4, seeds=8)
        seen = [{tuple(prompt) for prompt in server.served} for server in servers]
        assert [len(prompts) for prompts in seen] == [2, 2]
        assert not seen[0] & seen[1]


def test_no_server_gets_more_than_it_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet_of(folder, 2, monkeypatch, max_num_seqs=3) as (fleet, servers):
        assert len(sample(fleet, groups=5, seeds=4)) == 20
        assert all(0 < server.most_at_once <= 3 for server in servers)
        assert fleet.stats().running == fleet.stats().waiting == 0


def test_a_silent_server_gets_no_requests_until_it_answers_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = ServersConfig(probe_seconds=0.5)
    with fleet_of(folder, 2, monkeypatch, impatient) as (fleet, (first, second)):
        first.speaks.clear()
        wait_until(lambda: not fleet.states()["remote-0"].serves)
        before = len(first.served)
        sample(fleet, groups=4)
        assert len(first.served) == before and len(second.served) == 16
        first.speaks.set()
        wait_until(lambda: fleet.states()["remote-0"].serves)


def test_a_server_that_forgot_its_weights_is_brought_up_to_date_before_it_serves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fleet_of(folder, 1, monkeypatch) as (fleet, (server,)):
        server.label = "default"  # as after a restart that nobody saw
        wait_until(lambda: server.label == "0")
        wait_until(lambda: fleet.states()["remote-0"].serves)
        assert {rollout.version for rollout in sample(fleet)} == {0}


def test_cancelled_requests_leave_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancel_early(fleet: Fleet, server: FakeServer) -> None:
        call = fleet.generate([1] * 9, seeds=list(range(40)), max_tokens=8, temperature=1.0, top_p=1.0)
        task = asyncio.create_task(call)
        await asyncio.to_thread(wait_until, lambda: server.at_once == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with fleet_of(folder, 1, monkeypatch, max_num_seqs=2) as (fleet, (server,)):
        server.works.clear()
        asyncio.run(cancel_early(fleet, server))
        server.works.set()
        wait_until(lambda: fleet.stats().running == fleet.stats().waiting == 0)
        assert len(sample(fleet)) == 4


def test_a_fleet_without_servers_is_refused(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"rollout\.servers\.count"):
        Fleet(folder, Settings(), scratch=folder, logs=folder)


def test_a_fleet_whose_servers_never_come_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "_POLL_SECONDS", 0.01)
    url = "http://127.0.0.1:9"
    servers = ServersConfig(urls=(url,), start_seconds=0.05, max_restarts=2)
    with pytest.raises(EngineError, match=f"1 engines are lost\nremote-0: .*{url}"):
        Fleet(folder, Settings(servers=servers), scratch=folder, logs=folder)


def test_a_server_that_hangs_is_ended_by_who_keeps_it_and_its_requests_are_asked_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping_module, "_POLL_SECONDS", 0.01)
    keeping = partial(Keeping, tmp_path, "7-0")
    impatient = ServersConfig(probe_seconds=1.0, request_seconds=10 * PATIENCE)
    with fleet_of(folder, 2, monkeypatch, impatient, keeping=keeping) as (fleet, (hung, other)):
        kept = keeping(hung.url)

        def keep() -> None:
            wait_until(lambda: kept.asked_to_end)
            hung.label, hung.faults = "default", []
            hung.speaks.set()
            kept.ended()

        keeper = threading.Thread(target=keep)
        keeper.start()
        hung.works.clear()
        hung.speaks.clear()
        rollouts = within(PATIENCE, lambda: sample(fleet, groups=4))
        assert len(rollouts) == len(other.served) == 16
        keeper.join()
        hung.works.set()
        wait_until(lambda: fleet.states()["remote-0"].serves)
        assert not keeping(other.url).asked_to_end


def test_one_that_has_ended_by_itself_is_not_ended_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who keeps it has seen that, and its successor is on its way."""
    keeping = partial(Keeping, tmp_path, "7-0")
    settings = ServersConfig(probe_seconds=PATIENCE, start_seconds=0.5, max_restarts=1)
    with fleet_of(folder, 2, monkeypatch, settings, keeping=keeping) as (fleet, (gone, _)):
        gone.dead = True
        gone.shutdown()
        gone.server_close()
        wait_until(lambda: fleet.states()["remote-0"].state is State.LOST)
        wait_until(lambda: keeping(gone.url).given_up)  # or it would take memory, and nobody put it to sleep
    assert len(list(tmp_path.iterdir())) == 1


def test_a_server_that_makes_room_while_it_is_restarted_is_not_given_up(tmp_path: Path) -> None:
    at = Address("http://127.0.0.1:9")
    keeping = Keeping(tmp_path, "7-0", at.url)

    async def restarted() -> State:
        async def trainer_comes() -> None:
            if member.health.state is State.STARTING:
                await member.happened(Evicted())

        member = Member(
            "remote-0", Health(0, State.DEAD), context(trainer_comes), address=at, keeping=keeping
        )
        await member._restart()
        await member.close()
        return member.health.state

    assert asyncio.run(restarted()) is State.DEAD
    assert not keeping.given_up


def context(on_change: Callable[[], Coroutine[Any, Any, None]]) -> FleetContext:
    async def bring_up_to_date(_: Member) -> None: ...

    room = asyncio.Event()
    room.set()
    return FleetContext(PATIENT, Limits(), bring_up_to_date, on_change, room)


@pytest.mark.parametrize("fails", [False, True])
def test_a_server_whose_start_is_called_off_is_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    begun, called_off = threading.Event(), threading.Event()
    started: list[ServerProcess] = []

    def start(_: object) -> ServerProcess:
        begun.set()
        called_off.wait(PATIENCE)
        if fails:
            raise OSError("no space left")
        started.append(ServerProcess("http://127.0.0.1:9"))
        return started[-1]

    monkeypatch.setattr(member_module.Server, "start", start)

    async def call_off() -> None:
        async def nobody_asks() -> None: ...

        launch = Launch(folder, Settings(), tmp_path, tmp_path / "log")
        member = Member("engine-0", Health(0), context(nobody_asks), launch=launch)
        starting = asyncio.create_task(member.start())
        await asyncio.to_thread(begun.wait, PATIENCE)
        starting.cancel()
        called_off.set()
        # Whatever the thread met: a task goes on after other errors.
        with pytest.raises(asyncio.CancelledError):
            await starting
        await member.close()

    asyncio.run(call_off())
    assert [process.alive for process in started] == [False] * (not fails)


def test_a_server_that_is_given_up_keeps_nobody_waiting(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Keeping(tmp_path, "7-0", "http://127.0.0.1:9")
    lost.give_up()
    patient = ServersConfig(urls=(lost.url,), start_seconds=10 * PATIENCE)

    def build() -> None:
        Fleet(folder, Settings(servers=patient), scratch=folder, logs=folder, keeping=lambda _: lost).close()

    with pytest.raises(EngineError, match="1 engines are lost"):
        within(PATIENCE, build)


def test_a_thousand_requests_may_be_under_way() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        allow_connections(700)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1700
        allow_connections(5)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1700, "it is never lowered"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_request_that_every_server_fails_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet_of(folder, 2, monkeypatch) as (fleet, servers):
        for server in servers:
            server.faults = [error_500] * 1000
        with pytest.raises(EngineError, match=r"failed 20 times, at last on remote-\d: .*out of memory"):
            sample(fleet, seeds=1)


def test_who_waits_when_the_last_server_dies_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = ServersConfig(probe_seconds=PATIENCE, max_restarts=0)
    with fleet_of(folder, 1, monkeypatch, servers) as (fleet, (server,)):
        server.faults = [gone]
        with pytest.raises(EngineError, match="all 1 engines are lost"):
            sample(fleet)
        assert fleet.states()["remote-0"].state is State.LOST


def test_an_update_does_not_wait_for_servers_that_are_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM ends the servers of other nodes when it asks the trainer to stop: that has a state to save."""

    class NobodyThere:
        def update(self, peers: list[Peer], version: int, weights: object) -> dict[str, Unreached]:
            return {peer.name: Unreached("connection refused", silent=True, reached="") for peer in peers}

        def close(self) -> None: ...

    with fleet_of(folder, 1, monkeypatch) as (fleet, (server,)):
        server.dead = True
        vars(fleet)["_sender"] = NobodyThere()
        within(PATIENCE, lambda: fleet.update_weights([], 1))
        assert fleet.version == 1
        assert fleet.states()["remote-0"].state in (State.DEAD, State.STARTING)
        with pytest.raises(TimeoutError):  # who generates waits, and can be told to leave
            asyncio.run(asyncio.wait_for(one(fleet), 0.3))


def one(fleet: Fleet) -> Coroutine[Any, Any, list[Rollout]]:
    return fleet.generate([1, 2], seeds=[1], max_tokens=1, temperature=1.0, top_p=1.0)


def within(seconds: float, work: Callable[[], Value]) -> Value:
    """Its result; a TimeoutError when it takes longer."""
    done = Future[Value]()

    def finish() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=finish, daemon=True).start()
    return done.result(seconds)


def test_a_closed_fleet_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet_of(folder, 1, monkeypatch) as (fleet, _):
        assert fleet.states()["remote-0"].state is State.HEALTHY
        fleet.close()
        assert not fleet.healthy()
        with pytest.raises(EngineError, match="closed"):
            sample(fleet)


@pytest.mark.parametrize("dies", ["asleep", "on its way"])
def test_while_the_trainer_has_the_memory_no_server_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    started: list[ServerProcess] = []

    def start(_: object) -> ServerProcess:
        started.append(ServerProcess(fake.url))
        return started[-1]

    monkeypatch.setattr(member_module.Server, "start", start)
    with fleet_of(folder, 1, monkeypatch) as (_, [fake]):
        config = Settings(max_model_len=64, servers=replace(PATIENT, count=1))
        fleet = Fleet(folder, config, scratch=folder / "scratch", logs=folder / "logs", sleeps=True)
        fake.dead = dies == "on its way"
        if fake.dead:
            started[0].alive = False
            wait_until(lambda: len(started) == 2 and fleet.states()["engine-0"].state is State.STARTING)
        fleet.sleep()
        assert fake.calls == ["/sleep?level=1"] * (not fake.dead)
        started[0].alive = False
        wait_until(lambda: fleet.states()["engine-0"].state is State.DEAD)
        fake.dead = False
        fleet.wake("weights")
        time.sleep(0.3)
        before = len(started)
        assert not any(process.alive for process in started)
        fleet.wake("cache")
        wait_until(lambda: fleet.states()["engine-0"].state is State.HEALTHY)
        assert len(started) == before + 1
        fleet.close()
