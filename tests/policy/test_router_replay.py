"""Router replay in one process: exact for the learner's own choice and for any other, and counted.

Every layout is in the matrix (layouts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make_model
from reference import Reference, random_batch, reference, relative_error, with_experts
from transformers import AutoModelForCausalLM

from spell_megatron.config import OptimizerConfig, PolicyConfig
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.mismatch import mismatch
from spell_megatron.policy.optimizer import main_gradient
from spell_megatron.policy.replay import Choices, replayed
from spell_megatron.policy.spans import plan_spans
from spell_megatron.policy.stream import Part, Stream
from spell_megatron.policy.world import World
from spell_megatron.types import Group, Sample, SpellError, TrainBatch
from spell_megatron.weights.shape import model_shape

pytestmark = pytest.mark.unit

SHAPES = ((37, (5, 9, 12)), (1, (9, 4)), (40, (17,)), (12, (1,)))
BATCH = random_batch(256, shapes=SHAPES)


@pytest.fixture(scope="module", params=[True, False], ids=["normalised", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose experts' weights add up to 1 (softmax behind the choice), and one where it is before."""
    path = tmp_path_factory.mktemp("model")
    return make_model("moe", path, seed=1, initializer_range=0.1, norm_topk_prob=request.param)


def learner(folder: Path, world: World, **policy: Any) -> Learner:
    settings = {"dtype": "float32", "stream_tokens": 96, "optimizer": OptimizerConfig(lr=1e-2), **policy}
    return Learner(PolicyConfig(**settings), folder, world)


def outcome(learner: Learner, batch: TrainBatch) -> tuple[float, dict[str, torch.Tensor], list[np.ndarray]]:
    """Loss, gradients and log-probs."""
    loss = learner.gradients(batch)
    gradients = {name: tensor.clone() for name, tensor in learner.weights(main_gradient)}
    return loss, gradients, [sample for group in learner.score(batch).logprobs for sample in group]


@torch.no_grad()
def own_choice(folder: Path, batch: TrainBatch, dtype: torch.dtype = torch.float64) -> TrainBatch:
    """What Hugging Face's routers choose for it, one sequence at a time, and the log-probs that come of it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    top_k = model.config.num_experts_per_tok
    groups = []
    for group in batch.groups:
        samples, prompt = [], len(group.prompt)
        for sample in group.samples:
            ids = torch.tensor([[*group.prompt, *sample.tokens]])
            computed = model(ids, output_router_logits=True)
            logits = torch.stack(computed.router_logits, 1).float()
            chosen = logits.topk(top_k).indices.numpy().astype(np.uint8)
            logprobs = computed.logits[0, prompt - 1 : -1].float().log_softmax(-1)
            given = logprobs.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0].tolist()
            samples.append(replace(sample, logprobs=given, experts=chosen[prompt:-1]))
        groups.append(Group(group.prompt, tuple(samples), chosen[:prompt]))
    return TrainBatch(tuple(groups))


@pytest.mark.parametrize("policy", [{}, {"share_prompts": False}, {"recompute": "full"}])
def test_its_own_choice_replayed_changes_no_bit(folder: Path, world: World, policy: dict[str, Any]) -> None:
    loss, gradients, logprobs = outcome(learner(folder, world, **policy), BATCH)
    told = learner(folder, world, router_replay=True, **policy)
    again, same, replayed_logprobs = outcome(told, own_choice(folder, BATCH))
    assert again == loss
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    assert all(np.array_equal(a, b) for a, b in zip(replayed_logprobs, logprobs, strict=True))
    assert told.replay and told.replay.differing() == 0.0
    # Nothing told is nothing changed, too.
    untold, same, _ = outcome(told, BATCH)
    assert untold == loss and all(torch.equal(same[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("policy", [{}, {"share_prompts": False}, {"recompute": "full"}])
def test_any_other_choice_equals_transformers_with_its_routers_forced(
    folder: Path, world: World, policy: dict[str, Any]
) -> None:
    batch = with_experts(BATCH, layers=2, experts=4, top_k=2)
    expected, free = reference(folder, batch), reference(folder, BATCH)
    told = learner(folder, world, router_replay=True, **policy)
    loss, gradients, logprobs = outcome(told, batch)
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    errors = [relative_error(gradients[name], true) for name, true in expected.gradients.items()]
    assert max(errors) <= 1e-5
    assert _far(logprobs, expected) <= 1e-5 < 0.1 < _far(logprobs, free), "the choice makes no difference"


def test_it_takes_the_largest_gaps_to_an_engine_in_bfloat16_away(folder: Path, world: World) -> None:
    """The engine is transformers, in bfloat16 as the learner: what differs is how sums are rounded."""
    batch = own_choice(folder, random_batch(256), torch.bfloat16)
    labels = ["all"] * len(batch.groups)
    gaps, told = [], learner(folder, world, dtype="bfloat16", stream_tokens=192, router_replay=True)
    for policy in (learner(folder, world, dtype="bfloat16", stream_tokens=192), told):
        gaps.append(mismatch(batch, policy.score(batch), labels, 0))
    assert gaps[1]["mismatch/max"] < gaps[0]["mismatch/max"] / 3
    assert gaps[1]["mismatch/mean"] < gaps[0]["mismatch/mean"]
    assert told.replay and 0.0 < (told.replay.differing() or 0.0) < 0.05


def _far(logprobs: list[np.ndarray], other: Reference) -> float:
    theirs = [sample for group in other.logprobs for sample in group]
    return max(float(np.abs(a - b).max()) for a, b in zip(logprobs, theirs, strict=True))


def test_the_gap_counts_what_the_routers_would_have_chosen_otherwise(folder: Path, world: World) -> None:
    """With one layer, so that a forced choice does not change what a later router sees."""
    shallow = make_model("moe", folder / "shallow", seed=2, num_hidden_layers=1, initializer_range=0.1)
    own = own_choice(shallow, BATCH)
    other = with_experts(BATCH, layers=1, experts=4, top_k=2)
    same = [
        np.sort(a) == np.sort(b)
        for one, two in zip(own.groups, other.groups, strict=True)
        for a, b in [
            (one.experts, two.experts),
            *((s.experts, t.experts) for s, t in zip(one.samples, two.samples, strict=True)),
        ]
    ]
    expected = 1.0 - np.concatenate([rows.all(-1).ravel() for rows in same]).mean()
    update = learner(shallow, world, router_replay=True).update(other)
    assert update.router_metrics()["mismatch/router"] == pytest.approx(expected)
    assert update.router_metrics()["policy/replayed"] == 1.0
    half = TrainBatch((other.groups[0], *BATCH.groups[1:]))
    assert replayed(half) == pytest.approx(26 / 57)
    assert "mismatch/router" not in learner(shallow, world).update(other).router_metrics()


@pytest.mark.parametrize("cp", [1, 2])
def test_every_row_finds_its_own_token(cp: int, tmp_path: Path) -> None:
    """Experts that name their token: what a row is told must be what was chosen for the token that lies in it."""
    shape = replace(model_shape(make_model("moe", tmp_path)), layers=3, experts=4000, experts_per_token=1)
    names = iter(range(1, 10_000))

    def chosen(tokens: list[int]) -> np.ndarray:
        return np.array([[[t], [t + 1000], [t + 2000]] for t in tokens], dtype=np.uint16).reshape(-1, 3, 1)

    groups = []
    for prompt_length, replies in SHAPES:
        prompt = [next(names) for _ in range(prompt_length)]
        samples = tuple(
            Sample(reply, [0.0] * n, experts=chosen(reply[:-1]))
            for n in replies
            for reply in [[next(names) for _ in range(n)]]
        )
        groups.append(Group(prompt, samples, chosen(prompt)))
    batch = TrainBatch(tuple(groups))
    untold = {sample.tokens[-1] for group in batch.groups for sample in group.samples}
    stream = Stream((Part(2, (0,)), Part(0, (0, 2)), Part(1, (0, 1)), Part(0, (1,)), Part(3, (0,))))
    for rank in range(cp):
        plan = plan_spans(stream.layout(batch), cp_size=cp, cp_rank=rank, multiple=4)
        choices = Choices.of(batch, stream, plan.sources, shape)
        ids = plan.ids[0]
        for layer in range(3):
            known = torch.tensor([int(i) != 0 and int(i) not in untold for i in ids])
            expected = torch.where(known, ids + 1000 * layer, -1)
            assert torch.equal(choices.layer(layer)[:, 0], expected)
    empty = plan_spans([], cp_size=cp, multiple=4)
    assert (Choices.of(batch, Stream(), empty.sources, shape).layer(0) == -1).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda e: e[:, :1],
        lambda e: e[..., :1],
        lambda e: np.concatenate((e, e, e)),
        lambda e: e + np.uint8(2),
    ],
)
def test_experts_of_another_model_are_refused(
    folder: Path, world: World, spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    """By every rank, and so before any of them looks for its own part of the batch."""
    batch = with_experts(BATCH, layers=2, experts=4, top_k=2)
    first = batch.groups[0].samples[0]
    wrong = replace(batch.groups[0], samples=(replace(first, experts=spoil(first.experts)),))
    prompt = replace(batch.groups[1], experts=spoil(np.repeat(batch.groups[1].experts, 40, 0)))
    told = learner(folder, world, router_replay=True)
    told._passes.run = None  # type: ignore[assignment, method-assign]
    for groups in ((*batch.groups[1:], wrong), (prompt, *batch.groups)):
        for work in (told.score, told.update):
            with pytest.raises(SpellError, match="2 layers and 2 of 4 experts"):
                work(TrainBatch(groups))


@pytest.mark.parametrize(
    "asked", [{"router_replay": True}, {"freeze_router": True}, {"dispatcher": "deepep"}]
)
def test_a_dense_model_has_no_experts(world: World, tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(SpellError, match=f"policy.{next(iter(asked))}=.* is a dense model"):
        learner(make_model("qwen3", tmp_path), world, **asked)
