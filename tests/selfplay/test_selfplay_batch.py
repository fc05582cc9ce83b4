"""The batch's counts are the specification's arithmetic, and its weights the right advantages."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selfplay_stage import TASKS, episode, response
from selfplay_stage import settings as play_settings

from spell_megatron.config import SelfPlayConfig
from spell_megatron.selfplay.batch import compose
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.roles.questioner import choose_failures
from spell_megatron.selfplay.roles.verifier import verifier_groups
from spell_megatron.types import Rollout

pytestmark = pytest.mark.unit

SPLIT = [1] * 5 + [0] * 3


def kept(index: int, task: str = "doc_general_qa", votes=(), reward: float = 0.5, group: int = 8):
    """A kept question of which the first response alone is right."""
    responses = [response(float(number == 0), votes if number == 0 else ()) for number in range(group)]
    return episode(index, "kept", task, reward, responses)


def failed(index: int, outcome: str = "bad_format", task: str = "doc_general_qa"):
    return episode(index, outcome, task, {"bad_format": -1.0, "bad_ground": -0.5}.get(outcome, 0.0))


def test_the_reference_scale():
    """128 questions: 1,024 responder samples, 128 + 128 questioner samples, 16 groups of 8 verdicts."""
    episodes = [kept(i, TASKS[i % 3], SPLIT) for i in range(128)]
    episodes += [failed(200 + i, task=TASKS[i % 3]) for i in range(300)]
    batch = compose(episodes, SelfPlayConfig(), Random(0))
    assert batch.samples("responder") == 1024
    assert batch.samples("questioner") == 256
    assert batch.facts["batch/failures"] == 128
    assert batch.samples("verifier") == 128
    assert batch.roles.count("verifier") == 16
    assert len(batch.train.groups) == len(batch.roles) == len(batch.tasks) == 128 + 256 + 16


@pytest.mark.parametrize(
    ("questions", "group", "share", "groups"),
    [
        (128, 8, None, 16),
        (6, 4, None, 1),
        (7, 8, None, 0),
        (3, 3, 1 / 3, 1),
        (128, 8, 1.0, 128),
        (10, 8, 0.0, 0),
    ],
)
def test_number_of_verifier_groups(questions: int, group: int, share: float | None, groups: int):
    chosen = SelfPlayConfig(group_size=group, verifier_share=share)
    assert verifier_groups(questions, chosen) == groups
    if share is not None:
        assert groups == math.floor(round(questions * group * share / group, 9))


def test_too_few_verifier_groups_are_none():
    chosen = play_settings(questions=8, group_size=4)
    one = compose([kept(i, votes=SPLIT if i == 0 else (), group=4) for i in range(8)], chosen, Random(0))
    assert (
        one.facts["batch/verifier_pool"],
        one.facts["batch/verifier_wanted"],
        one.samples("verifier"),
    ) == (1, 2, 0)
    two = compose([kept(i, votes=SPLIT if i < 2 else (), group=4) for i in range(8)], chosen, Random(0))
    assert two.roles.count("verifier") == 2
    assert two.samples("verifier") == 16


def test_verdicts_against_the_rule_are_used_without_consistency_only():
    wrong = [episode(i, "kept", responses=[response(0.0, SPLIT), response(0.0)]) for i in range(8)]
    assert compose(wrong, play_settings(questions=8), Random(0)).facts["batch/verifier_pool"] == 0
    assert (
        compose(wrong, play_settings(questions=8, verifier_consistency="maj"), Random(0)).facts[
            "batch/verifier_pool"
        ]
        == 8
    )


def test_the_pool_takes_groups_of_questions_without_variance_too():
    episodes = [kept(i, group=4) for i in range(4)]
    episodes.append(episode(9, "zero_variance", reward=0.0, responses=[response(1.0, SPLIT)] * 4))
    assert compose(episodes, play_settings(questions=4), Random(0)).facts["batch/verifier_pool"] == 4


def test_failures_are_matched_per_task_and_a_shortfall_passes_on():
    good = [kept(i, "doc_general_qa") for i in range(4)] + [kept(i, "doc_mc") for i in range(4)]
    bad = [failed(10, task="doc_general_qa")] + [failed(20 + i, task="doc_mc") for i in range(9)]
    chosen = Counter(e.task for e in choose_failures(good, good + bad, 1.0, Random(0)))
    assert chosen == {"doc_general_qa": 1, "doc_mc": 7}
    bad = [failed(10 + i, task="doc_general_qa") for i in range(9)] + [failed(20, task="doc_mc")]
    chosen = Counter(e.task for e in choose_failures(good, good + bad, 1.0, Random(0)))
    assert chosen == {"doc_general_qa": 4, "doc_mc": 1}


def test_only_penalised_outcomes_are_failures():
    good = [kept(i) for i in range(9)]
    bad = [failed(20 + i, outcome) for i, outcome in enumerate(["bad_format", "bad_ground", "zero_variance"])]
    dropped = [
        episode(30, "dropped:over_long", reward=None),
        episode(31, "dropped:not_a_number", reward=None),
    ]
    assert {e.index for e in choose_failures(good, [*good, *bad, *dropped], 1.0, Random(0))} == {20, 21, 22}


def test_surplus_questions_stay_out():
    batch = compose([kept(i, group=4) for i in range(9)], play_settings(questions=4), Random(0))
    assert batch.roles.count("responder") == 4
    assert batch.samples("questioner") == 4


def test_weights_are_advantages_on_every_token():
    episodes = [
        kept(0, reward=1.0, group=4),
        kept(1, reward=0.5, group=4),
        failed(2),
        kept(3, "doc_mc", group=4),
    ]
    batch = compose(episodes, play_settings(questions=3, train_verifier=False), Random(0))
    pairs = list(zip(batch.train.groups, batch.roles, strict=True))
    by_role = {role: [group for group, other in pairs if other == role] for role in batch.roles}
    mean, std = (1.0 + 0.5 - 1.0) / 3, math.sqrt(sum((r - 0.5 / 3) ** 2 for r in (1.0, 0.5, -1.0)) / 2)
    weights = [group.samples[0].weights for group in by_role["questioner"]]
    expected = {1.0: 0, 0.5: 1, -1.0: 3}
    for reward, place in expected.items():
        assert weights[place] == pytest.approx([(reward - mean) / (std + 1e-6)] * len(weights[place]))
    assert set(weights[2]) == {0.0}  # a lone question of its task
    for group in by_role["responder"]:
        assert group.samples[0].weights[0] == pytest.approx(1.5, abs=1e-5)  # (1 - 1/4) / (1/2)
        assert group.samples[1].weights[0] == pytest.approx(-0.5, abs=1e-5)
        assert all(len(s.weights) == len(s.tokens) == len(s.logprobs) for s in group.samples)


@pytest.mark.parametrize(
    ("key", "role"), [("train_questioner", "questioner"), ("train_verifier", "verifier")]
)
def test_a_role_that_is_not_trained_is_not_in_the_batch(key: str, role: str):
    episodes = [kept(i, votes=SPLIT, group=4) for i in range(8)] + [failed(20)]
    assert compose(episodes, play_settings(questions=8), Random(0)).samples(role) > 0
    batch = compose(episodes, play_settings(questions=8, **{key: False}), Random(0))
    assert batch.samples(role) == 0
    assert batch.samples("responder") == 32


outcomes = st.sampled_from(["kept", "bad_format", "bad_ground", "zero_variance", "dropped:over_long"])


@settings(max_examples=150)
@given(
    st.lists(st.tuples(outcomes, st.sampled_from(TASKS), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    st.sampled_from([None, 0.1, 0.5, 1.0]),
    st.integers(0, 9),
)
def test_counts_and_weights_of_any_step(
    drawn: list, questions: int, ratio: float, share: float | None, seed: int
):
    episodes = [
        kept(i, task, SPLIT if disputed else (), reward=i % 4 / 4, group=4)
        if outcome == "kept"
        else failed(i, outcome, task)
        for i, (outcome, task, disputed) in enumerate(drawn)
    ]
    chosen = play_settings(questions=questions, failure_ratio=ratio, verifier_share=share)
    batch = compose(episodes, chosen, Random(seed))
    good = min(questions, sum(e.kept for e in episodes))
    assert batch.samples("responder") == 4 * good
    assert batch.samples("questioner") == good + batch.facts["batch/failures"]
    assert batch.facts["batch/failures"] <= ratio * good
    pool = sum(e.kept and bool(e.responses[0].votes) for e in episodes)
    wanted = math.floor(good * (0.25 if share is None else share) + 1e-9)
    assert (batch.facts["batch/verifier_pool"], batch.facts["batch/verifier_wanted"]) == (pool, wanted)
    assert batch.roles.count("verifier") == (wanted if wanted <= pool else 0)
    weights = [w for g in batch.train.groups for s in g.samples for w in s.weights]
    assert all(map(math.isfinite, weights))
    assert batch.train.response_tokens == len(weights)
    available = sum(e.outcome in ("bad_format", "bad_ground", "zero_variance") for e in episodes)
    if good == 0 or ratio == 0:
        assert batch.facts["batch/failures"] == 0
    elif len({e.task for e in episodes}) == 1:
        assert batch.facts["batch/failures"] == min(available, math.floor(ratio * good))


def test_experts_go_along_to_the_learner_and_not_into_the_journal():
    """The prompt's once a group, those of the completions with each sample."""

    def told(rollout: Rollout, number: int) -> Rollout:
        return replace(
            rollout,
            prompt_experts=np.full((len(rollout.prompt), 2, 1), number, np.uint8),
            experts=np.full((len(rollout.tokens) - 1, 2, 1), number, np.uint8),
        )

    question = kept(0)
    responses = tuple(replace(r, rollout=told(r.rollout, n)) for n, r in enumerate(question.responses))
    question = replace(question, responses=responses)
    settings = play_settings(questions=1, failure_ratio=0.0, train_questioner=False, train_verifier=False)
    (group,) = compose([question], settings, Random(0)).train.groups
    assert group.experts is responses[0].rollout.prompt_experts
    assert [sample.experts[0, 0, 0] for sample in group.samples] == list(range(8))
    again = Episode.from_dict(json.loads(json.dumps(question.to_dict())))
    assert again == question
    assert all(rollout.experts is rollout.prompt_experts is None for _, rollout in again.rollouts())
