"""A fleet of real vLLM servers: resync, faults, restart, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from models import make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spell_megatron.config import RolloutConfig as Settings
from spell_megatron.config import ServersConfig
from spell_megatron.rollout.engine import EngineError
from spell_megatron.rollout.fleet import Fleet
from spell_megatron.rollout.health import State
from spell_megatron.types import Rollout, version_spans

pytestmark = pytest.mark.engine

SERVERS = ServersConfig(
    count=2, probe_seconds=15, sync_seconds=20, start_seconds=400, in_flight="restart", verify="checksum"
)


def settings(servers: ServersConfig) -> Settings:
    return Settings(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        max_batched_tokens=512,
        kv_cache_mib=32,
        servers=servers,
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def folders(scratch: Path) -> list[Path]:
    return [make_model("qwen3", scratch / f"qwen3-{seed}", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def fleet(folders: list[Path], scratch: Path) -> Iterator[Fleet]:
    fleet = Fleet(folders[0], settings(SERVERS), scratch=scratch / "vllm", logs=scratch / "logs")
    yield fleet
    groups = fleet.process_groups().values()
    fleet.close()
    assert not any(psutil.pid_exists(group) for group in groups)
    assert not [
        p for p in psutil.Process().children(recursive=True) if "vllm" in " ".join(p.cmdline()).lower()
    ]


async def play(fleet: Fleet, groups: int = 6, max_tokens: int = 24) -> list[Rollout]:
    calls = (
        fleet.generate(
            [5 + group, *range(10, 60)],
            seeds=[8 * group + i for i in range(4)],
            max_tokens=max_tokens,
            temperature=1.0,
            top_p=1.0,
        )
        for group in range(groups)
    )
    return [rollout for rollouts in await asyncio.gather(*calls) for rollout in rollouts]


@torch.no_grad()
def worst(folder: Path, rollouts: list[Rollout]) -> float:
    """Largest difference of log-probs to a Hugging Face forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return max(differences(model, rollout).max().item() for rollout in rollouts)


def differences(model: torch.nn.Module, rollout: Rollout) -> torch.Tensor:
    """Of every token's log-prob to that of a Hugging Face forward."""
    logits = model(torch.tensor([[*rollout.prompt, *rollout.tokens]])).logits[0]
    logprobs = logits[len(rollout.prompt) - 1 : -1].log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(rollout.tokens)[:, None])[:, 0]
    return (own - torch.tensor(rollout.logprobs)).abs()


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert condition()


def all_serve(fleet: Fleet) -> bool:
    return all(health.serves for health in fleet.states().values())


def update(fleet: Fleet, folder: Path) -> None:
    fleet.update_weights(load_file(folder / "model.safetensors").items(), fleet.version + 1)


def current_and_right(fleet: Fleet, folder: Path, rollouts: list[Rollout]) -> None:
    assert {rollout.version for rollout in rollouts} == {fleet.version}
    assert worst(folder, rollouts) <= 1e-4


def test_every_server_follows_the_trainer(fleet: Fleet, folders: list[Path]) -> None:
    rollouts = asyncio.run(play(fleet))
    current_and_right(fleet, folders[0], rollouts)
    assert [rollout.tokens for rollout in asyncio.run(play(fleet))] == [r.tokens for r in rollouts]
    for folder in folders[1:]:
        update(fleet, folder)
        assert all_serve(fleet)
        current_and_right(fleet, folder, asyncio.run(play(fleet)))


def test_an_update_restarts_what_runs(fleet: Fleet, folders: list[Path]) -> None:
    async def overlapped() -> list[Rollout]:
        before = fleet.stats().generated_tokens
        running = asyncio.create_task(play(fleet, groups=24, max_tokens=200))
        while fleet.stats().generated_tokens == before:  # until the first of them have ended
            await asyncio.sleep(0.01)
        await asyncio.to_thread(update, fleet, folders[0])
        return await running

    rollouts = asyncio.run(overlapped())
    current = [rollout for rollout in rollouts if rollout.version == fleet.version]
    earlier = [rollout for rollout in rollouts if rollout.version == fleet.version - 1]
    assert current and earlier and len(current) + len(earlier) == 96
    assert worst(folders[0], current) <= 1e-4
    assert worst(folders[2], earlier) <= 1e-4


def test_a_killed_server_loses_no_request_and_comes_back_with_the_current_weights(
    fleet: Fleet, folders: list[Path]
) -> None:
    update(fleet, folders[1])
    before = fleet.process_groups()["engine-0"]

    async def bereft() -> list[Rollout]:
        running = asyncio.create_task(play(fleet, groups=8, max_tokens=200))
        while fleet.stats().running < 16:
            await asyncio.sleep(0.02)
        os.kill(before, signal.SIGKILL)  # the API server alone: its workers must not survive it
        return await running

    rollouts = asyncio.run(bereft())
    assert len(rollouts) == 32
    current_and_right(fleet, folders[1], rollouts)
    wait_until(lambda: all_serve(fleet))
    assert fleet.process_groups()["engine-0"] != before
    assert not [p for p in psutil.process_iter() if _group(p) == before]
    current_and_right(fleet, folders[1], asyncio.run(play(fleet)))


def test_a_stopped_server_cannot_stall_an_update(
    fleet: Fleet, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    stopped = fleet.process_groups()["engine-1"]
    os.killpg(stopped, signal.SIGSTOP)
    update(fleet, folders[2])  # fails for engine-1 in its timeout; engine-0 goes on alone
    assert "no answer from engine-1" in caplog.text
    assert not fleet.states()["engine-1"].serves
    current_and_right(fleet, folders[2], asyncio.run(play(fleet)))
    assert fleet.states()["engine-0"].serves
    wait_until(lambda: all_serve(fleet))
    assert fleet.process_groups()["engine-1"] != stopped
    current_and_right(fleet, folders[2], asyncio.run(play(fleet)))


def test_a_worker_that_stops_in_the_middle_of_a_transfer_is_named(
    fleet: Fleet, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    group = fleet.process_groups()["engine-0"]
    weights = list(load_file(folders[0] / "model.safetensors").items())

    def stalling() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights[:-1]
        wait_until(lambda: fleet._sender._store.reached == weights[-2][0])  # the transfer is under way
        os.killpg(group, signal.SIGSTOP)
        name, tensor = weights[-1]
        yield name, tensor

    fleet.update_weights(stalling(), fleet.version + 1)
    # Whichever end notices first says it: the trainer that cannot send, or the one that gets no answer.
    assert re.search(
        f"failed by {weights[-1][0]}: .*(engine-0 .* did not answer|no answer from engine-0)", caplog.text
    )
    assert "no answer from engine-0" in caplog.text
    wait_until(lambda: all_serve(fleet))
    current_and_right(fleet, folders[0], asyncio.run(play(fleet)))


def test_a_tensor_that_changes_on_its_way_is_sent_again(
    fleet: Fleet, folders: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from spell_megatron.rollout.transfer import gloo

    broadcast, faulty = gloo._broadcast, iter([True])

    def damaging(group: torch.distributed.ProcessGroup, tensor: torch.Tensor) -> None:
        broadcast(group, tensor.roll(1) if next(faulty, False) else tensor)

    monkeypatch.setattr(gloo, "_broadcast", damaging)
    first = next(iter(load_file(folders[1] / "model.safetensors")))
    update(fleet, folders[1])
    assert f"was given other weights than were sent: 1 tensors, {first} the first" in caplog.text
    wait_until(lambda: all_serve(fleet))
    current_and_right(fleet, folders[1], asyncio.run(play(fleet)))


def test_an_update_that_breaks_off_serves_nothing_until_one_succeeds(
    fleet: Fleet, folders: list[Path]
) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(load_file(folders[0] / "model.safetensors").items()))
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        fleet.update_weights(broken(), fleet.version + 1)
    with pytest.raises(EngineError, match="did not finish"):
        asyncio.run(play(fleet, groups=1))
    update(fleet, folders[0])
    current_and_right(fleet, folders[0], asyncio.run(play(fleet)))


def test_versions_only_grow_and_each_server_has_a_log(
    fleet: Fleet, folders: list[Path], scratch: Path
) -> None:
    with pytest.raises(EngineError, match="only grow"):
        fleet.update_weights([], fleet.version)
    assert sorted(path.name for path in (scratch / "logs").iterdir()) == ["engine-0.log", "engine-1.log"]
    assert {health.state for health in fleet.states().values()} == {State.HEALTHY}


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return -1


@torch.no_grad()
def test_what_runs_goes_on_under_the_new_weights(folders: list[Path], scratch: Path) -> None:
    """As if these had read it from its start: vLLM takes its cache when it pauses, and computes it anew."""
    servers = replace(SERVERS, count=1, in_flight="continue")
    logs = scratch / "continued"
    fleet = Fleet(folders[2], settings(servers), scratch=scratch / "vllm", logs=logs, stop=[])

    async def overlapped() -> list[Rollout]:
        running = asyncio.create_task(play(fleet, groups=8, max_tokens=160))
        while not fleet.stats().generated_tokens:  # until half of them have ended, and the others have begun
            await asyncio.sleep(0.01)
        await asyncio.to_thread(update, fleet, folders[1])
        return await running

    try:
        update(fleet, folders[0])  # the first transfer connects, which takes a while
        rollouts = asyncio.run(overlapped())
        repeated = asyncio.run(play(fleet, groups=1))
    finally:
        fleet.close()
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        for folder in folders[:2]
    ]
    assert sum(bool(rollout.updates) for rollout in rollouts) >= 3
    for rollout in rollouts:
        gaps = [differences(model, rollout) for model in models]
        spans = version_spans(rollout)
        assert max(gaps[version - 1][first:end].max() for version, first, end in spans) <= 1e-4
        # Of all spans together: one may be a single token, which both models happen to find as likely.
        others = max(gaps[2 - version][first:end].max() for version, first, end in spans)
        assert others > 0.1, "the two models are too alike to tell apart"
    assert worst(folders[1], repeated) <= 1e-4, "what the old weights cached was used"
