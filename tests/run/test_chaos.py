"""A run of self-play on the toy world while its servers are killed, stopped, cut off and broken."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from faulty_proxy import Fault, proxies

from spell_megatron.config import load_config
from spell_megatron.rollout import member as member_module
from spell_megatron.rollout.server import Launch, Server
from spell_megatron.run.record import Journal, RunFolder, read_metrics
from spell_megatron.run.train import train

pytestmark = pytest.mark.engine

STEPS, QUESTIONS, G = 4, 5, 4
FAULTS = {"kill": 2, "stop": 2, "error": 6, "reset": 6, "half": 3, "failed update": 1}
SPACING = 300
"""Completions between two faults that cost a server its life."""
SMALL = (
    f"steps={STEPS}",
    f"selfplay.questions={QUESTIONS}",
    "selfplay.round_questions=15",
    f"selfplay.group_size={G}",
    "heldout.questions=0",
    "record.checkpoint_every=0",
    "rollout.kv_cache_mib=64",
    "rollout.servers.count=2",
    "rollout.servers.verify=checksum",
    "rollout.servers.probe_seconds=4",
    "rollout.servers.request_seconds=120",
    "rollout.servers.sync_seconds=8",
    "rollout.servers.start_seconds=300",
)


class Chaos:
    """Decides what happens to which request: faults strike at fixed counts of completions and updates."""

    def __init__(self, seed: int) -> None:
        draw = Random(seed)
        deadly = ["kill"] * FAULTS["kill"] + ["stop"] * FAULTS["stop"]
        cheap = [name for name in ("error", "reset", "half") for _ in range(FAULTS[name])]
        draw.shuffle(deadly)
        self._plan = {SPACING // 2 + SPACING * number: fault for number, fault in enumerate(deadly)}
        places = [
            place for place in range(10, SPACING * len(deadly) - SPACING // 2) if place not in self._plan
        ]
        self._plan |= dict(zip(draw.sample(places, len(cheap)), cheap, strict=True))
        self._updates = {2 + 2 * number for number in range(FAULTS["failed update"])}
        self._lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.servers: dict[str, Server] = {}

    def strikes(self, url: str, path: str) -> Fault:
        with self._lock:
            self.seen[path] += 1
            if path == "/update_weights" and self.seen[path] in self._updates:
                self.struck["failed update"] += 1
                return "error"
            fault = self._plan.get(self.seen[path]) if path.endswith("/generate") else None
            if fault is None:
                return ""
            self.struck[fault] += 1
        if fault == "kill":
            os.kill(self.servers[url].group, signal.SIGKILL)
        elif fault == "stop":
            os.killpg(self.servers[url].group, signal.SIGSTOP)
        return fault if fault in ("error", "reset", "half") else ""  # type: ignore[return-value]


@pytest.fixture(scope="module")
def chaos() -> Chaos:
    return Chaos(seed=4)


@pytest.fixture(scope="module")
def run(chaos: Chaos, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    runs = tmp_path_factory.mktemp("chaos")
    start = Server.start
    with pytest.MonkeyPatch.context() as patch, proxies(chaos.strikes) as network:

        def behind_a_proxy(launch: Launch) -> Server:
            server = start(launch)
            chaos.servers[str(server.address)] = server
            server.address = network.front(server.address)
            return server

        patch.setattr(Server, "start", behind_a_proxy)
        patch.setattr(member_module, "_PROBE_EVERY", 2.0)
        return RunFolder(Path(train(load_config("toy", (*SMALL, f"runs={runs}"))).run_dir))


def test_every_fault_struck_and_the_run_ended(run: RunFolder, chaos: Chaos) -> None:
    assert chaos.struck == FAULTS
    assert sum(FAULTS.values()) == 20
    assert [row["step"] for row in read_metrics(run)] == list(range(STEPS + 1))
    assert len(chaos.servers) >= 2 + FAULTS["kill"] + FAULTS["stop"]


def test_groups_are_complete_and_of_one_version(run: RunFolder) -> None:
    for step in range(1, STEPS + 1):
        episodes = Journal(run, step).read()
        assert len({(episode.round, episode.index) for episode in episodes}) == len(episodes)
        for episode in episodes:
            assert {rollout.version for _, rollout in episode.rollouts()} == {step - 1}
            assert len(episode.responses) in ((0, G) if not episode.kept else (G,))
            for response in episode.responses:
                assert len(response.judgements) in ((0, G) if response.answer is None else (G,))
                assert len(response.rollout.logprobs) == len(response.rollout.tokens)


def test_counts_add_up(run: RunFolder, chaos: Chaos) -> None:
    rows: list[dict[str, Any]] = list(read_metrics(run)[1:])  # type: ignore[arg-type]
    for row in rows:
        finished = Journal(run, int(row["step"])).read()
        rollouts = [rollout for episode in finished for _, rollout in episode.rollouts()]
        outcomes = sum(value for name, value in row.items() if name.startswith("outcome/"))
        assert row["outcome/kept"] == row["batch/questions"] == QUESTIONS
        assert outcomes == row["questions"] <= len(finished)
        # What was sampled for episodes that were then not needed counts as generated, too.
        assert row["tokens/generated"] >= sum(len(rollout.tokens) for rollout in rollouts)
        assert row["tokens/prompt"] >= sum(len(rollout.prompt) for rollout in rollouts)
        assert row["mismatch/max"] < 1e-3
    samples = sum(1 for row in rows for e in Journal(run, int(row["step"])).read() for _ in e.rollouts())
    assert chaos.seen["/inference/v1/generate"] >= samples + sum(
        FAULTS[f] for f in ("error", "reset", "half")
    )


def test_nothing_is_left_behind(run: RunFolder, chaos: Chaos) -> None:
    assert run.path.is_dir()
    groups = {server.group for server in chaos.servers.values()}
    assert not [process for process in psutil.process_iter() if _group(process.pid) in groups]
    assert not [p for p in psutil.Process().children(recursive=True) if "vllm" in " ".join(p.cmdline())]


def test_each_server_says_in_its_log_what_happened(run: RunFolder) -> None:
    logs = [run.path / "engines" / f"engine-{index}.log" for index in range(2)]
    assert all(log.stat().st_size for log in logs)
    assert json.dumps(sorted(path.name for path in (run.path / "engines").iterdir()))


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1
