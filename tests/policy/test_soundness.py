"""Numbers that would poison a run: planted one by one, each stops the update and leaves the weights alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from models import make_model
from objectives import batch_with_engine

from spell_megatron.config import Config, OptimizerConfig, PolicyConfig, RecordConfig
from spell_megatron.policy import agreement
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.passes import Pass
from spell_megatron.policy.soundness import UnsoundError, entropy_beyond
from spell_megatron.policy.world import World
from spell_megatron.run.run import BadStepError, Collected, Run, Updated
from spell_megatron.types import SpellError, TrainBatch

pytestmark = pytest.mark.unit

BATCH = batch_with_engine()
NAN = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture
def learner(folder: Path, world: World) -> Learner:
    return made(folder, world)


def made(folder: Path, world: World, *, minibatches: int = 1, **optimizer: Any) -> Learner:
    policy = PolicyConfig(
        dtype="float32",
        stream_tokens=192,
        head_chunk=16,
        minibatches=minibatches,
        optimizer=OptimizerConfig(**optimizer),
    )
    return Learner(policy, folder, world)


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}


def planted(batch: TrainBatch, place: int, **values: Any) -> TrainBatch:
    """The batch with a wrong value in the last sample of one group."""
    groups = list(batch.groups)
    *before, last = groups[place].samples
    changed = {name: [*getattr(last, name)[:-1], value] for name, value in values.items()}
    groups[place] = replace(groups[place], samples=(*before, replace(last, **changed)))
    return TrainBatch(tuple(groups))


def prompted(batch: TrainBatch, place: int, prompt: tuple[int, ...]) -> TrainBatch:
    """The batch with another prompt of one group."""
    groups = list(batch.groups)
    groups[place] = replace(groups[place], prompt=prompt)
    return TrainBatch(tuple(groups))


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "words"), [("logprobs", "of the engine"), ("weights", "advantages")])
def test_a_batch_that_is_not_finite_names_its_group(
    learner: Learner, name: str, words: str, value: float
) -> None:
    before = weights(learner)
    with pytest.raises(UnsoundError, match=words) as error:
        learner.update(planted(BATCH, 1, **{name: value}))
    assert (error.value.group, error.value.touched) == (1, False)
    assert all(torch.equal(before[name], now) for name, now in weights(learner).items())


@pytest.mark.parametrize("value", [-1, 256, 1 << 40])
@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_ids_that_are_no_tokens_of_the_model_name_their_group(
    learner: Learner, where: str, value: int
) -> None:
    """On a GPU they would end the process, so that they are seen before anything is computed: scores, too."""
    batch = planted(BATCH, 1, tokens=value)
    if where == "prompt":
        batch = prompted(BATCH, 1, (3, value, 5))
    for work in (learner.update, learner.score):
        with pytest.raises(UnsoundError, match=f"{value}.*, and the model's from 0 to 255") as error:
            work(batch)
        assert (error.value.group, error.value.touched) == (1, False)


def test_a_prompt_that_is_empty_names_its_group(learner: Learner) -> None:
    """The first token of an answer would be predicted from another group's last."""
    with pytest.raises(UnsoundError, match="a prompt is empty") as error:
        learner.update(prompted(BATCH, 2, ()))
    assert error.value.group == 2


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_one_gradient_stops_the_update_and_the_next_one_goes_on(learner: Learner, value: float) -> None:
    before = weights(learner)
    name, parameter = list(learner.named_parameters())[3]
    run = learner._passes.run

    def with_a_fault(*args: Any, **kwargs: Any) -> Pass:
        done = run(*args, **kwargs)
        parameter.main_grad.view(-1)[7] = value  # type: ignore[attr-defined]
        return done

    learner._passes.run = with_a_fault  # type: ignore[method-assign]
    with pytest.raises(UnsoundError, match=f"gradients are not finite at {name}") as error:
        learner.update(BATCH)
    assert not error.value.touched
    assert all(torch.equal(before[name], now) for name, now in weights(learner).items())
    learner._passes.run = run  # type: ignore[method-assign]
    assert learner.update(BATCH).grad_norm > 0
    assert not all(torch.equal(before[name], now) for name, now in weights(learner).items())


def test_a_step_whose_scores_are_asked_for_first_is_skipped_as_any_other(learner: Learner) -> None:
    steps = Steps(None, bad_step="skip", mismatch_action="drop")
    steps.run.learner = learner
    steps.collected = replace(steps.collected, batch=planted(BATCH, 1, tokens=256))
    assert steps.run.update(steps.collected) == Updated(None)
    assert "in group 1 (verifier, docmath_qa); the step is skipped" in steps.told[0]


def test_one_weight_stops_before_anything_is_computed(learner: Learner) -> None:
    name, parameter = list(learner.named_parameters())[-1]
    with torch.no_grad():
        parameter.view(-1)[-1] = NAN
    with pytest.raises(UnsoundError, match=f"weights are not finite at {name}") as error:
        learner.update(BATCH)
    assert error.value.touched, "such weights must not be saved"


@pytest.mark.parametrize("lr", [1e30, 1e3])
def test_a_rate_that_wrecks_the_model_is_seen_in_the_same_step(folder: Path, world: World, lr: float) -> None:
    with pytest.raises(UnsoundError, match="after the update weights are") as error:
        made(folder, world, lr=lr).update(BATCH)
    assert error.value.touched


def test_a_judge_is_asked_before_the_optimizer_steps(learner: Learner) -> None:
    before = weights(learner)
    with pytest.raises(UnsoundError, match=r"entropy_max=0\.5"):
        learner.update(BATCH, lambda scores: entropy_beyond(scores.entropy, 0.0, 0.5))
    with pytest.raises(UnsoundError, match="entropy_min=7"):
        learner.update(BATCH, lambda scores: entropy_beyond(scores.entropy, 7.0, None))
    assert all(torch.equal(before[name], now) for name, now in weights(learner).items())


def test_a_fault_in_a_minibatch_names_the_group_of_the_batch(folder: Path, world: World) -> None:
    """Minibatches are dealt in turns; the place is of the whole batch, whose role and task are looked up by it."""
    learner = made(folder, world, minibatches=3, lr=1e-9)
    seen = list[int]()

    def second(scores: Any) -> UnsoundError | None:
        seen.append(len(scores.entropy))
        return UnsoundError("odd", group=1) if len(seen) == 2 else None

    with pytest.raises(UnsoundError, match="odd") as error:
        learner.update(BATCH, second)
    assert error.value.group == 4  # the second minibatch has groups 1, 4, 7, …
    assert error.value.touched


def test_where_a_judge_fails_on_rank_0_no_other_rank_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks one after another: what rank 0 gives to all, fault or value, is what the others go by."""
    given: list[Any] = []

    def agreed(value: Any, group: Any) -> Any:
        given.append(value)
        return given[0]

    monkeypatch.setattr(agreement, "agreed", agreed)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD="all"))
    main, other = (cast(World, SimpleNamespace(size=2, is_main=first)) for first in (True, False))
    with pytest.raises(ZeroDivisionError):
        agreement.share(lambda: 1 // 0, main)
    with pytest.raises(
        SpellError, match=r"rank 0 has given up \(ZeroDivisionError\); its own message says why"
    ):
        agreement.share(lambda: 1 // 0, other)
    given.clear()
    assert [agreement.share(lambda: 7, main), agreement.share(lambda: 8, other)] == [7, 7]


@pytest.mark.parametrize("empty", [(0,), (0, 1), (-1,), "all"])
def test_a_completion_of_no_tokens_is_trained_on_as_nothing(learner: Learner, empty: Any) -> None:
    group = next(group for group in BATCH.groups if len(group.samples) > 2)
    places = range(len(group.samples)) if empty == "all" else [n % len(group.samples) for n in empty]
    samples = list(group.samples)
    for place in places:
        samples[place] = replace(samples[place], tokens=(), weights=(), logprobs=())
    others = tuple(other for other in BATCH.groups if other is not group)
    with_empty = TrainBatch((replace(group, samples=tuple(samples)), *others))
    without = tuple(sample for sample in samples if sample.tokens)
    rest = TrainBatch((*((replace(group, samples=without),) if without else ()), *others))
    scores = learner.score(with_empty)
    assert [len(row) for row in scores.logprobs[0]] == [len(sample.tokens) for sample in samples]
    assert learner.gradients(with_empty) == pytest.approx(learner.gradients(rest), rel=1e-5)


class Steps:
    """A run whose learner finds faults; what is saved and noted is told."""

    def __init__(self, *faults: UnsoundError | None, reward: float = 0.5, **record: Any) -> None:
        self.told: list[str] = []
        self._faults = list(faults)
        run = self.run = Run.__new__(Run)
        run.config = replace(Config(), record=RecordConfig(**record))
        run._placement = SimpleNamespace(enter=lambda phase: None)  # type: ignore[assignment]
        run.world = SimpleNamespace(size=1)  # type: ignore[assignment]
        run.learner = SimpleNamespace(update=self._update)  # type: ignore[assignment]
        run._checkpoints = SimpleNamespace(wait=lambda: None)  # type: ignore[assignment]
        run._save = lambda: self.told.append(f"saved {run.step}")  # type: ignore[method-assign]
        batch = SimpleNamespace(roles=("questioner", "verifier"), tasks=("doc_mc", "docmath_qa"))
        batch.without = lambda dropped: batch
        played: Any = SimpleNamespace(play=SimpleNamespace(batch=batch))
        self.collected = Collected(5, BATCH, played)
        run._skipped, run.step = 0, 4
        run.lead = SimpleNamespace(  # type: ignore[assignment]
            note=self.told.append,
            reward=lambda played: reward,
            set_aside=lambda step: self.told.append(f"aside {step}"),
            phase=lambda name: nullcontext(),
        )

    def _update(self, batch: Any, judge: Callable[..., Any]) -> Any:
        if (fault := self._faults.pop(0)) is not None:
            raise fault
        return "updated"


def test_a_bad_step_stops_with_its_group_and_the_state_of_before() -> None:
    steps = Steps(UnsoundError("log-probs are not finite", group=1))
    with pytest.raises(
        BadStepError, match=r"step 5: .* in group 1 \(verifier, docmath_qa\).*after step 4 is saved"
    ):
        steps.run.update(steps.collected)
    assert steps.told == ["saved 4", "aside 5"]


@pytest.mark.parametrize("bad_step", ["stop", "skip"])
def test_wrecked_weights_are_never_saved_nor_gone_on_with(bad_step: str) -> None:
    steps = Steps(UnsoundError("weights are far too large", touched=True), bad_step=bad_step)
    with pytest.raises(BadStepError, match="not saved; `resume` goes on from the last checkpoint"):
        steps.run.update(steps.collected)
    assert not steps.told


def test_a_bad_step_is_skipped_but_not_three_in_a_row() -> None:
    fault = UnsoundError("gradients are not finite")
    steps = Steps(fault, fault, None, fault, fault, fault, bad_step="skip")
    assert [steps.run.update(steps.collected) for _ in range(5)] == [
        Updated(made) for made in (None, None, "updated", None, None)
    ]
    assert len(steps.told) == 4
    with pytest.raises(BadStepError):
        steps.run.update(steps.collected)


@pytest.mark.parametrize("reward", [0.01, NAN])
def test_a_reward_that_has_collapsed_stops_before_the_update(reward: float) -> None:
    steps = Steps(None, reward=reward, reward_min=0.1)
    with pytest.raises(BadStepError, match=r"below record\.reward_min=0\.1"):
        steps.run.update(steps.collected)
    assert steps._faults == [None], "nothing was computed"
