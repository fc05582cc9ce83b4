"""Engines that take turns with the trainer, whatever becomes of them: nothing touches memory that sleeps.

The fleet, its guards, processes and HTTP are real; the servers are `sleeping_server.py`, which knows what a server on a
GPU may be asked in which part of its sleep, and writes down every violation.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sleeping_server
from models import make_model
from safetensors.torch import load_file

from spell_megatron.base.placement import Phase, Placement
from spell_megatron.config import RolloutConfig, ServersConfig
from spell_megatron.rollout.colocation import EngineOffload
from spell_megatron.rollout.engine import WeightsWanted
from spell_megatron.rollout.fleet import Fleet
from spell_megatron.rollout.health import State
from spell_megatron.rollout.server import Launch
from spell_megatron.rollout.transfer import fanout

pytestmark = pytest.mark.engine

SERVERS = ServersConfig(
    count=3,
    transfer="shm",
    probe_seconds=1,
    sync_seconds=2,
    start_seconds=60,
    request_seconds=4,
    max_restarts=50,
)


class Stage:
    """A fleet of servers that sleep, its phases, and the weights that it is given."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._weights = load_file(folder / "model.safetensors")
        self.orders, self.violations = scratch / "orders", scratch / "violations"
        self.orders.mkdir()
        settings = RolloutConfig(dtype="float32", max_model_len=64, servers=SERVERS)
        self.fleet = Fleet(
            folder, settings, scratch=scratch / "vllm", logs=scratch / "logs", stop=(), sleeps=True
        )
        self.placement = Placement()
        self.placement.admit(EngineOffload(self.fleet))
        self.version = 0

    def order(self, route: str, what: str) -> None:
        (self.orders / route.strip("/").replace("/", "-")).write_text(what)

    def step(self) -> None:
        """Rollouts, an update, a resync, a checkpoint, and rollouts again."""
        self.play()
        self.placement.enter(Phase.UPDATE)
        self.resync(self.version + 1)
        self.placement.enter(Phase.SAVE)
        self.play()

    def resync(self, version: int) -> None:
        self.placement.enter(Phase.RESYNC)
        self.version = version
        self.fleet.update_weights(self._weights.items(), version)

    def play(self) -> None:
        """As the session does: where nobody kept the weights, they are sent once more."""
        while True:
            self.placement.enter(Phase.GENERATE)
            try:
                (rollout,) = asyncio.run(
                    self.fleet.generate([1, 2, 3], seeds=[1], max_tokens=4, temperature=1.0, top_p=1.0)
                )
            except WeightsWanted:
                self.resync(self.version)
            else:
                assert rollout.version == self.version
                return


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    scratch = tmp_path_factory.mktemp("sleep")
    original = Launch.command

    def command(launch: Launch, *where: object) -> list[str]:
        """The same arguments, to another program."""
        _, _, _, *arguments = original(launch, *where)  # type: ignore[arg-type]
        return [
            sys.executable,
            sleeping_server.__file__,
            str(scratch / "violations"),
            str(scratch / "orders"),
            *arguments,
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "command", command)
        patch.setattr(fanout, "_GRACE_SECONDS", 1.0)  # its workers have no time-out of their own to tell of
        made = Stage(make_model("qwen3", scratch / "model"), scratch)
        try:
            yield made
        finally:
            made.fleet.close()


def kill_one(stage: Stage) -> None:
    signal_one(stage, signal.SIGKILL)


def stop_one(stage: Stage) -> None:
    """It answers no probe from here on, and no call."""
    signal_one(stage, signal.SIGSTOP)


def signal_one(stage: Stage, number: signal.Signals) -> None:
    for group in stage.fleet.process_groups().values():
        with suppress(ProcessLookupError):  # the fault before has ended that one
            return os.killpg(group, number)
    raise AssertionError("no server lives")


ORDERS = [
    (route, what) for route in ("/sleep", "/wake_up", "/update_weights") for what in ("die", "refuse", "hang")
]


def test_a_step_without_faults(stage: Stage) -> None:
    stage.step()
    stage.step()
    deadline = time.monotonic() + 60
    while {health.state for health in stage.fleet.states().values()} != {State.HEALTHY}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not stage.violations.exists()


@pytest.mark.parametrize(
    ("route", "what"), [*ORDERS, ("/finish_weight_update", "die"), ("/resume", "refuse")]
)
def test_one_that_fails_in_its_sleep_or_on_its_way_out_of_it(stage: Stage, route: str, what: str) -> None:
    stage.order(route, what)
    stage.step()
    stage.step()
    assert not list(stage.orders.iterdir()), "the order was carried out"
    assert not stage.violations.exists(), stage.violations.read_text()


@pytest.mark.parametrize("fault", [kill_one, stop_one])
@pytest.mark.parametrize("phase", [Phase.GENERATE, Phase.UPDATE, Phase.RESYNC, Phase.SAVE])
def test_one_that_dies_or_hangs_in_any_phase(
    stage: Stage, fault: Callable[[Stage], None], phase: Phase
) -> None:
    stage.play()
    if phase is not Phase.GENERATE:
        stage.placement.enter(Phase.UPDATE)
    if phase in (Phase.RESYNC, Phase.SAVE):
        stage.placement.enter(Phase.RESYNC)
    if phase is Phase.SAVE:
        stage.resync(stage.version + 1)
        stage.placement.enter(Phase.SAVE)
    fault(stage)
    if phase in (Phase.UPDATE, Phase.RESYNC):
        stage.resync(stage.version + 1)
    stage.play()
    stage.step()
    assert not stage.violations.exists(), stage.violations.read_text()


def test_all_of_them_die_while_the_trainer_has_the_memory(stage: Stage) -> None:
    stage.play()
    stage.placement.enter(Phase.UPDATE)
    for group in stage.fleet.process_groups().values():
        os.killpg(group, signal.SIGKILL)
    stage.resync(stage.version + 1)
    stage.play()
    assert not stage.violations.exists(), stage.violations.read_text()


def test_the_server_notices_what_must_not_be(tmp_path: Path) -> None:
    """Otherwise its silence would prove nothing."""
    engine = sleeping_server.Engine(tmp_path / "violations")

    class Request:
        query_params = type(
            "Query", (dict,), {"getlist": lambda self, name: [self[name]] if name in self else []}
        )()

        async def body(self) -> bytes:
            return b""

    async def forbidden() -> None:
        request = Request()
        for call in (engine.sleep, engine.weight_info, engine.start_update, engine.update, engine.resume):
            await call(request)  # type: ignore[arg-type]
        engine.paused = False
        await engine.generate(request)  # type: ignore[arg-type]

    asyncio.run(forbidden())
    assert len((tmp_path / "violations").read_text().splitlines()) == 5
