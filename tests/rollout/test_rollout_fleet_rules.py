"""The fleet's pure parts: the health of a server, and who gets a request."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.rollout import guard
from spell_megatron.rollout.address import Address
from spell_megatron.rollout.client import Client
from spell_megatron.rollout.dispatch import Dispatcher
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.health import (
    Answered,
    Event,
    Evicted,
    Exited,
    Failed,
    Health,
    Limits,
    NewVersion,
    Ready,
    Restarted,
    Slept,
    State,
    Synced,
    SyncFailed,
    Woke,
    after,
)
from spell_megatron.rollout.server import Server
from spell_megatron.rollout.transfer.manifest import Manifest

pytestmark = pytest.mark.unit

PATIENCE = 60.0

ANSWER = {
    "choices": [
        {
            "finish_reason": "stop",
            "token_ids": [5],
            "logprobs": {"content": [{"logprob": -0.5}]},
            "weight_versions": [{"version": "3", "start": 0, "end": 1}],
        }
    ],
    "usage": {"prompt_tokens_details": None},
    "world_size": 2,
}


def test_whatever_a_server_answers_is_a_completion_or_an_error_of_its_own() -> None:
    """Each part of a right answer in turn is something else."""

    def changed(value: Any) -> Iterator[Any]:
        yield from (None, "x", [], {}, [None], 7)
        if isinstance(value, dict):
            yield from (value | {key: other} for key in value for other in changed(value[key]))
        elif isinstance(value, list):
            yield from ([other] for other in changed(value[0]))

    async def ask(body: bytes, status: int = 200) -> Any:
        client = Client(Address("http://engine"), PATIENCE)
        await client.close()
        transport = httpx.MockTransport(lambda request: httpx.Response(status, content=body))
        client._http = httpx.AsyncClient(transport=transport, base_url="http://engine")
        done = await client.complete((1, 2), seed=0, max_tokens=1, temperature=1.0, top_p=1.0, stop=())
        return done.rollout.tokens, await client.world_size(1.0)

    assert asyncio.run(ask(json.dumps(ANSWER).encode())) == ((5,), 2)
    bodies = [json.dumps(other).encode() for other in changed(ANSWER)]
    for body in (*bodies, b"<html>", b"[" * 200_000, b"\xff", b""):
        try:
            tokens, size = asyncio.run(ask(body))
        except EngineError:
            continue
        assert isinstance(size, int) and all(isinstance(token, int) for token in tokens)
    with pytest.raises(EngineError):
        asyncio.run(ask(b"", 307))


LIMITS = Limits(failures=2, restarts=2)
VERSIONS = (0, 1, 2)
EVENTS: list[Event] = [
    Ready(),
    SyncFailed(),
    Answered(),
    Failed(),
    Exited(),
    Restarted(),
    Evicted(),
    Slept(kept=True),
    Slept(kept=False),
    Woke("weights"),
    Woke("cache"),
    *map(Synced, VERSIONS),
    *map(NewVersion, VERSIONS),
]


def steps_from(health: Health) -> list[tuple[Event, Health]]:
    legal = [e for e in EVENTS if not (isinstance(e, NewVersion) and e.version < health.target)]
    return [(event, after(health, event, LIMITS)) for event in legal]


def everything_reachable() -> dict[Health, list[tuple[Event, Health]]]:
    """All healths that any order of events can lead to, with the steps between them."""
    graph: dict[Health, list[tuple[Event, Health]]] = {}
    todo = deque([Health(target=0)])
    while todo:
        health = todo.popleft()
        if health not in graph:
            graph[health] = steps_from(health)
            todo.extend(new for _, new in graph[health])
    return graph


GRAPH = everything_reachable()
STEPS = [(old, event, new) for old, steps in GRAPH.items() for event, new in steps]


def test_every_state_is_reachable() -> None:
    assert {health.state for health in GRAPH} == set(State)


def test_only_the_target_version_serves() -> None:
    assert all(health.held == health.target for health in GRAPH if health.serves)


def test_the_only_ways_to_health_are_a_sync_and_an_answer_of_the_synced_process() -> None:
    for old, event, new in STEPS:
        if new.serves and not old.serves:
            synced = isinstance(event, Synced) and old.state is State.SYNCING and event.version == new.target
            answered = isinstance(event, Answered) and old.state is State.SUSPECT and old.held == old.target
            woke = isinstance(event, Woke) and old.asleep == {event.memory} and old.held == old.target
            assert synced or answered or woke


def test_who_sleeps_serves_nothing_and_is_given_weights_only_where_they_are_awake() -> None:
    for health in GRAPH:
        assert not (health.asleep and health.serves)
        assert not (health.receives and "weights" in health.asleep)
        assert (health.state is State.ASLEEP) <= bool(health.asleep)
        assert not (health.asleep and health.state in (State.SUSPECT, State.DEAD, State.STARTING, State.LOST))


def test_weights_that_were_given_up_are_of_no_version() -> None:
    for old, event, new in STEPS:
        assert not (new.blank and new.held is not None)
        if old.blank and not new.blank:
            assert isinstance(event, (Synced, Exited, Failed, SyncFailed))


def test_a_process_knows_no_version_before_its_own_sync() -> None:
    for old, event, new in STEPS:
        if new.held != old.held:
            assert new.held is None or event == Synced(new.held)
            assert new.held is not None or not isinstance(event, Woke)
        if new.state in (State.STARTING, State.DEAD, State.LOST):
            assert new.held is None


def test_a_new_version_takes_every_server_out_of_service() -> None:
    for old, event, new in STEPS:
        if isinstance(event, NewVersion) and event.version != old.held:
            assert not new.serves and new.target == event.version


def test_faults_and_restarts_are_bounded() -> None:
    for old, event, new in STEPS:
        assert new.failures < LIMITS.failures
        assert new.restarts <= LIMITS.restarts
        if isinstance(event, Failed) and old.state is State.HEALTHY:
            assert not new.serves
        if old.state is State.LOST:
            assert new.state is State.LOST


def test_from_anywhere_but_lost_a_server_can_come_back() -> None:
    def recovers(health: Health) -> bool:
        path: list[Event] = [Exited(), Restarted(), Ready(), Synced(health.target)]
        for event in path:
            health = after(health, event, LIMITS)
        return health.serves

    assert all(recovers(h) for h in GRAPH if h.state is not State.LOST and h.restarts < LIMITS.restarts)
    assert not any(recovers(h) for h in GRAPH if h.state is State.LOST)


def test_a_target_never_goes_back() -> None:
    with pytest.raises(ValueError, match="goes back"):
        after(Health(target=3), NewVersion(2), LIMITS)


def prompt(seed: int, length: int = 300) -> list[int]:
    return [random.Random(seed).randrange(1000) for _ in range(length)]


def test_a_group_stays_together_and_groups_spread() -> None:
    dispatcher = Dispatcher(capacity=64)
    homes = []
    for group in range(4):
        engines = {dispatcher.choose(prompt(group), ["a", "b", "c", "d"]) for _ in range(8)}
        assert len(engines) == 1
        homes += engines
    assert sorted(homes) == ["a", "b", "c", "d"]
    assert dispatcher.running() == 32


def test_a_long_common_prefix_leads_to_the_engine_that_holds_it() -> None:
    dispatcher = Dispatcher(capacity=64)
    documents = prompt(0, 1024)
    first = dispatcher.choose([*documents, 1, 2], ["a", "b"])
    dispatcher.choose(prompt(1), ["a", "b"])
    dispatcher.choose(prompt(2), ["a", "b"])
    assert dispatcher.choose([*documents, 3, 4, 5], ["a", "b"]) == first
    few = [*documents[:100], *prompt(3, 1000)]  # a common instruction is no reason to crowd one engine
    for engine in ("a", "b"):
        while dispatcher.running(engine) < 3:
            dispatcher.choose(prompt(dispatcher.running() + 10), [engine])
    dispatcher.choose(prompt(99), [first or ""])
    assert dispatcher.choose(few, ["a", "b"]) != first


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=80),
    st.integers(1, 4),
    st.sets(st.sampled_from("abc"), max_size=3),
)
def test_no_engine_gets_more_than_its_capacity(
    moves: list[tuple[int, bool]], capacity: int, engines: set[str]
) -> None:
    dispatcher, running = Dispatcher(capacity), Counter[str]()
    for seed, ends in moves:
        if ends and running.total():
            engine = max(running, key=lambda name: running[name])
            dispatcher.finished(engine)
            running[engine] -= 1
            continue
        chosen = dispatcher.choose(prompt(seed, 20), engines)
        assert (chosen is None) == all(running[name] == capacity for name in engines)
        if chosen is not None:
            assert chosen in engines
            running[chosen] += 1
            assert running[chosen] <= capacity
    assert dispatcher.running() == running.total()


def test_kept_weights_are_the_streams_and_survive_a_half_read_one() -> None:
    from spell_megatron.rollout.transfer.store import WeightStore

    def weights(value: float) -> dict[str, torch.Tensor]:
        return {name: torch.full((2, 3), value) for name in "abc"}

    store = WeightStore(Manifest(dict.fromkeys("abc", (2, 3))), torch.device("cpu"))
    for version, value in ((1, 1.0), (2, 2.0)):
        stream = weights(value)
        store.begin()
        assert store.version is None
        store.fill(stream.items(), version)
        for name, _ in store:
            if name == "b":
                break  # a transfer that failed
        assert store.version == version
        stream["a"].fill_(-1)  # the trainer goes on; what is kept does not change
        assert {name: tensor.unique().item() for name, tensor in store} == dict.fromkeys("abc", value)
        assert [meta.name for meta in store.metadata()] == ["a", "b", "c"]
    store.begin()
    with pytest.raises(EngineError, match="lacks 2 tensors"):
        store.fill({"a": torch.zeros(2, 3)}.items(), 3)
    with pytest.raises(EngineError, match="lacks 2 tensors"):
        list(store)
    assert store.version is None


def test_a_reader_follows_a_stream_that_fills_and_a_slow_one_holds_up_nobody() -> None:
    from spell_megatron.rollout.transfer.store import WeightStore

    names, seen = "abcdef", threading.Semaphore(0)

    def streamed() -> Iterator[tuple[str, torch.Tensor]]:
        for place, name in enumerate(names):
            if place == 3:
                assert seen.acquire(
                    timeout=PATIENCE
                )  # the reader is given the first while the rest is to come
            yield name, torch.full((2,), float(place))

    def read(pause: Callable[[], object]) -> dict[str, float]:
        got = {}
        for name, tensor in store:
            got[name] = tensor[0].item()
            pause()
        return got

    store = WeightStore(Manifest(dict.fromkeys(names, (2,))), torch.device("cpu"))
    store.begin()
    filled = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        known = pool.submit(store.metadata)
        quick = pool.submit(read, seen.release)
        slow = pool.submit(read, lambda: filled.wait(PATIENCE))
        store.fill(streamed(), 1)
        filled.set()
        expected = {name: float(place) for place, name in enumerate(names)}
        assert quick.result(PATIENCE) == slow.result(PATIENCE) == expected
        assert [meta.name for meta in known.result(PATIENCE)] == list(names)


def test_who_reads_weights_is_told_when_a_ctrl_c_breaks_them_off() -> None:
    from spell_megatron.rollout.transfer.store import WeightStore

    def interrupted() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(2)
        raise KeyboardInterrupt

    store = WeightStore(Manifest(dict.fromkeys("ab", (2,))), torch.device("cpu"))
    store.begin()
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(store.metadata), pool.submit(list, store)]
        with pytest.raises(KeyboardInterrupt):
            store.fill(interrupted(), 1)
        try:
            for reader in readers:
                with pytest.raises(EngineError, match="broke off by KeyboardInterrupt"):
                    reader.result(PATIENCE)
        finally:  # or the pool waits for them
            store.version, store._known = 1, True
            with store._changed:
                store._changed.notify_all()
    assert store.version == 1


def test_an_allocators_other_settings_stand_when_its_segments_stop_expanding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from spell_megatron.rollout.transfer.local import _expand_segments

    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", told.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    _expand_segments(False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:False")
    _expand_segments(False)
    assert not told
    configured = "max_split_size_mb:512,expandable_segments:{},garbage_collection_threshold:0.8"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", configured.format(True))
    for on in (False, True):
        _expand_segments(on)
    assert told == [configured.format(False), configured.format(True)]


FAMILY = (
    "import subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "time.sleep(600)\n"
)


def family(group: int) -> list[psutil.Process]:
    """Living processes of a process group."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    return [process for process in psutil.process_iter() if belongs(process)]


def wait_for(count: int, group: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(family(group)) != count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(family(group)) == count


@pytest.mark.parametrize("end", ["parent closes the pipe", "parent is killed", "server is killed", "stopped"])
def test_nothing_outlives_the_guards_parent(end: str) -> None:
    starter = (  # a parent that starts a guard and sleeps; killed, it cannot say goodbye
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-m', {guard.__name__!r}, sys.executable, '-c', {FAMILY!r}],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)\n"
        "print(p.stdout.readline().decode().strip(), flush=True)\n"
        "sys.stdin.readline(); p.stdin.close(); p.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None and parent.stdin is not None
    group = int(parent.stdout.readline())
    wait_for(2, group)
    if end == "server is killed":
        psutil.Process(group).kill()
    elif end == "parent is killed":
        parent.kill()
    else:
        if end == "stopped":
            for process in family(group):
                process.suspend()
        parent.stdin.close()
    wait_for(0, group)
    parent.kill()
    parent.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("whom", ["guard", "its other half"])
def test_nothing_outlives_a_guard_that_is_signalled(number: signal.Signals, whom: str) -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", guard.__name__, sys.executable, "-c", FAMILY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert started.stdout is not None and started.stdin is not None
    try:
        group = int(started.stdout.readline())
        wait_for(2, group)
        (half,) = psutil.Process(started.pid).children()
        os.kill(started.pid if whom == "guard" else half.pid, number)
        wait_for(0, group)
        started.wait(PATIENCE)
    finally:
        started.stdin.close()
        started.kill()
        started.wait()


@pytest.mark.parametrize("end", ["told", "server is killed", "guard is killed"])
def test_shared_memory_of_a_server_is_removed_however_it_ends(end: str) -> None:
    """Its trackers do that when everybody else is gone; on a node it would outlive the job."""
    server = (
        "import time; from multiprocessing.shared_memory import SharedMemory\n"
        "made = SharedMemory(create=True, size=1 << 16); print(made.name, file=__import__('sys').stderr, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-m", guard.__name__, sys.executable, "-c", server],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as started:
        assert started.stdin and started.stdout and started.stderr
        group = int(started.stdout.readline())
        memory = Path("/dev/shm", started.stderr.readline().decode().strip())
        wait_for(2, group)
        assert memory.exists()
        if end == "told":
            started.stdin.close()
        else:
            os.kill(group if end == "server is killed" else started.pid, signal.SIGKILL)
        wait_for(0, group)
        assert not memory.exists()


def test_nothing_outlives_a_guard_whose_other_half_fails(tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    guarding = (
        f"import sys, pathlib; from {guard.__package__} import guard; guard.LOOK_SECONDS = 0.05;"
        f" guard._bound = lambda _: pathlib.Path({str(failing)!r}).exists() and 1 / 0;"
        f" sys.exit(guard.main([sys.executable, '-c', {FAMILY!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", guarding],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as started:
        assert started.stdout is not None
        group = int(started.stdout.readline())
        try:
            wait_for(2, group)
            failing.touch()
            wait_for(0, group)
            assert started.wait(PATIENCE) == 1
        finally:
            for process in family(group):
                process.kill()


def test_a_log_that_cannot_be_looked_at_ends_no_server(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    os.close(descriptor)
    guard._bound(descriptor)
    gone = Server(Address("http://engine"), 0, tmp_path / "gone.log", Any, tmp_path)  # type: ignore[arg-type]
    assert "gone.log cannot be read" in gone.tail()


def test_a_servers_log_is_begun_anew_where_it_is_too_long(tmp_path: Path) -> None:
    """A server that prints until that has happened three times, and a guard that looks often."""
    log = tmp_path / "engine-0.log"
    server = (
        "import os\n"
        "size = begun = line = 0\n"
        "while begun < 3:\n"
        "    print('line', line, flush=True)\n"
        "    before, size, line = size, os.fstat(1).st_size, line + 1\n"
        "    begun += size < before\n"
        "print('the end', flush=True)"
    )
    guarding = (
        f"import sys; from {guard.__package__} import guard; guard.LOG_BYTES, guard.LOOK_SECONDS = 10_000, 0.05;"
        f" sys.exit(guard.main([sys.executable, '-c', {server!r}]))"
    )
    with log.open("ab") as written:
        started = subprocess.Popen(
            [sys.executable, "-c", guarding], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written
        )
    with started:
        assert started.wait(120) == 0
    older = log.with_name("engine-0.log.1").read_text().splitlines()
    assert sum(map(len, older)) > 10_000 * 0.8 and all(line.startswith("line") for line in older[1:-1])
    assert log.read_text().splitlines()[-1] == "the end"
