"""Whose memory it is: the order of leaving and coming, and a learner that went away and came back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch
from models import make_model
from reference import random_batch

from spell_megatron.base.placement import Part, Phase, Placement
from spell_megatron.config import LayoutConfig, OptimizerConfig, PolicyConfig
from spell_megatron.policy.colocation import LearnerOffload
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.rollout.colocation import EngineOffload

pytestmark = pytest.mark.unit


class Tenant:
    """Writes down what it is told."""

    def __init__(self, log: list[tuple[str, str]], *parts: Part) -> None:
        self.parts, self._log = frozenset(parts), log

    def offload(self, parts: frozenset[Part], lost: frozenset[Part]) -> None:
        self._log += [("offload", part) for part in sorted(parts)]

    def onload(self, parts: frozenset[Part]) -> None:
        self._log += [("onload", part) for part in sorted(parts)]


def placed(log: list[tuple[str, str]]) -> Placement:
    placement = Placement(lambda: log.append(("barrier", "")))
    placement.admit(Tenant(log, "parameters", "optimizer"))
    placement.enter(Phase.BUILD)
    placement.admit(Tenant(log, "engine weights", "engine cache"))
    return placement


@pytest.mark.parametrize("phases", list(permutations((Phase.GENERATE, Phase.RESYNC, Phase.UPDATE))))
def test_nobody_comes_before_the_others_have_left(phases: tuple[Phase, ...]) -> None:
    log: list[tuple[str, str]] = []
    placement = placed(log)
    present: set[str] = {"engine weights", "engine cache"}
    for phase in phases:
        before = set(present)
        log.clear()
        placement.enter(phase)
        moves = [move for move, _ in log]
        assert moves == sorted(moves, key=["offload", "barrier", "onload"].index)
        for move, part in log:
            if move == "offload":
                present.remove(part)
            elif move == "onload":
                present.add(part)
            assert present <= before or present <= set(phase.value.holds)
        assert present == set(phase.value.holds)


def test_the_engine_is_built_in_empty_memory() -> None:
    log: list[tuple[str, str]] = []
    placed(log)
    assert log == [("offload", "optimizer"), ("offload", "parameters"), ("barrier", "")]


def test_every_rank_meets_at_the_same_barriers() -> None:
    logs: list[list[tuple[str, str]]] = [[], []]
    first = placed(logs[0])
    other = Placement(lambda: logs[1].append(("barrier", "")))  # a rank without the engine
    other.admit(Tenant(logs[1], "parameters", "optimizer"))
    other.enter(Phase.BUILD)
    for phase in (Phase.GENERATE, Phase.UPDATE, Phase.UPDATE, Phase.RESYNC, Phase.GENERATE):
        for placement in (first, other):
            placement.enter(phase)
        assert logs[0].count(("barrier", "")) == logs[1].count(("barrier", ""))


def test_a_step_moves_nothing_twice() -> None:
    log: list[tuple[str, str]] = []
    placement = placed(log)
    for phase in (Phase.GENERATE, Phase.GENERATE, Phase.UPDATE, Phase.RESYNC, Phase.GENERATE):
        placement.enter(phase)
    loads = [part for move, part in log if move == "onload"]
    assert loads == ["optimizer", "parameters", "engine weights", "engine cache"]


def test_where_nothing_was_admitted_nothing_moves() -> None:
    log: list[tuple[str, str]] = []
    placement = Placement(lambda: log.append(("barrier", "")))
    for phase in Phase:
        placement.enter(phase)
    assert not log


class Engine:
    """What `EngineOffload` needs of one."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def sleep(self, keep: bool = True) -> None:
        self._log.append("sleep" if keep else "discard")

    def wake(self, part: str) -> None:
        self._log.append(part)


def test_an_engine_leaves_as_a_whole_and_comes_back_in_parts() -> None:
    log: list[str] = []
    placement = Placement()
    placement.admit(EngineOffload(Engine(log)))  # type: ignore[arg-type]
    for phase in (
        *(Phase.SAVE, Phase.RESYNC, Phase.GENERATE, Phase.UPDATE, Phase.RESYNC),
        Phase.SAVE,
        Phase.GENERATE,
    ):
        log.append(phase.name)
        placement.enter(phase)
    expected = (
        "SAVE sleep RESYNC weights GENERATE cache"
        " UPDATE discard RESYNC weights"  # nobody reads the old weights again
        " SAVE sleep GENERATE weights cache"  # but these are the new ones
    )
    assert log == expected.split()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield start_world(LayoutConfig(), seed=0, timeout_seconds=60)
    stop_world()


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_learner_is_the_same_when_it_comes_back(
    world: World, tmp_path: Path, distributed: bool, dtype: str
) -> None:
    folder = make_model("qwen3_tied", tmp_path / "model", seed=1)
    policy = PolicyConfig(
        dtype=dtype,  # type: ignore[arg-type]
        stream_tokens=512,
        optimizer=OptimizerConfig(lr=1e-2, distributed=distributed),
    )
    stayed, travelled = (Learner(policy, folder, world) for _ in range(2))
    placement = Placement()
    placement.admit(LearnerOffload(travelled))
    batch = random_batch(256)
    for _ in range(3):
        expected = stayed.update(batch)
        placement.enter(Phase.UPDATE)
        update = travelled.update(batch)
        assert (update.loss, update.grad_norm) == (expected.loss, expected.grad_norm)
        placement.enter(Phase.RESYNC)
        pairs = zip(stayed.weights(), travelled.weights(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
        gradients = [buffer.grad_data for model in travelled.models for buffer in model.buffers]
        assert _held(iter(gradients)) == 0
        placement.enter(Phase.SAVE)
        assert all(gradient.untyped_storage().nbytes() and not gradient.any() for gradient in gradients)
        placement.enter(Phase.GENERATE)
        assert _held(parameter.data for chunk in travelled.chunks for parameter in chunk.parameters()) == 0


def _held(tensors: Iterator[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
