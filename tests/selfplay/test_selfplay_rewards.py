"""Rewards and votes, case by case from the specification."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.config import BeyondConfig, ConfigError, SelfPlayConfig, load_config
from spell_megatron.selfplay.rewards import (
    SHAPES,
    has_variance,
    is_settled,
    questioner_reward,
    responder_reward,
)
from spell_megatron.selfplay.voting import agreement, is_usable, majority, verdict_of, vote_reward

pytestmark = pytest.mark.unit

PAPER = SelfPlayConfig()
votes = st.lists(st.sampled_from([1, 0, None]), max_size=12)


@pytest.mark.parametrize(
    ("outcome", "mean", "reward"),
    [
        ("bad_format", 0.0, -1.0),
        ("bad_ground", 0.0, -0.5),
        ("zero_variance", 0.0, 0.0),
        ("zero_variance", 1.0, 0.0),
        ("zero_variance", 0.5, 0.0),
        ("dropped:over_long", 0.0, None),
        ("dropped:not_a_number", 0.0, None),
        ("dropped:long_reference", 0.0, None),
        ("kept", 0.5, 1.0),
        ("kept", 0.375, 0.7548396),
        ("kept", 0.25, 0.3246525),
        ("kept", 0.75, 0.3246525),
        ("kept", 1.5, 0.0),
    ],
)
def test_questioner(outcome: str, mean: float, reward: float | None):
    assert questioner_reward(outcome, mean, PAPER) == (reward if reward is None else pytest.approx(reward))


def test_shapes_of_the_questioners_reward():
    for mean in (0.125, 0.4, 0.5, 0.9):
        worth = {
            "gaussian": math.exp(-18 * (mean - 0.5) ** 2),
            "reverse": 1 - mean,
            "linear": 1 - 2 * abs(mean - 0.5),
        }
        assert set(worth) == set(SHAPES)
        for shape, expected in worth.items():
            settings_ = SelfPlayConfig(questioner_reward=shape)
            assert questioner_reward("kept", mean, settings_) == pytest.approx(expected)
            assert questioner_reward("zero_variance", 0.0, settings_) == 0.0
    other = SelfPlayConfig(bad_format_reward=-3.0, bad_ground_reward=-2.0, questioner_sigma=1.0)
    assert questioner_reward("bad_format", 0, other) == -3
    assert questioner_reward("bad_ground", 0, other) == -2
    assert questioner_reward("kept", 0.25, other) == pytest.approx(math.exp(-(0.25**2) / 2))


def test_a_question_may_earn_most_where_more_than_half_are_right() -> None:
    easier = SelfPlayConfig(beyond=BeyondConfig(peak=0.75))
    for mean in (0.125, 0.5, 0.75, 0.875):
        assert questioner_reward("kept", mean, easier) == pytest.approx(math.exp(-18 * (mean - 0.75) ** 2))
    moved = ["selfplay.beyond.peak=0.75", "selfplay.questioner_reward=linear"]
    with pytest.raises(ConfigError, match="moves the paper's reward"):
        load_config("toy", moved)


@pytest.mark.parametrize(("combine", "expected"), [("max", 1.0), ("min", 0.0), ("mean", 0.5), ("sum", 1.0)])
def test_responder(combine: str, expected: float):
    assert responder_reward((1.0, 0), combine) == responder_reward((0.0, 1), combine) == expected
    assert responder_reward((1.0, None, None), combine) == 1.0
    assert responder_reward((0.0, None), combine) == 0.0
    assert responder_reward((1.0, 1), combine) == (2.0 if combine == "sum" else 1.0)


@pytest.mark.parametrize(
    ("combine", "expected"), [("max", 1.0), ("min", 0.0), ("mean", pytest.approx(2 / 3)), ("sum", 2.0)]
)
def test_three_opinions(combine: str, expected: float):
    assert responder_reward((0.0, 1, 1.0), combine) == expected
    assert is_settled((0.0, 1), combine) is (combine == "max")
    assert not is_settled((0.0, None), combine)


def test_variance():
    assert has_variance([0.0, 0.0, 1.0])
    assert not has_variance([1.0] * 8)
    assert not has_variance([0.5] * 8)


@pytest.mark.parametrize(
    ("group", "verdict"),
    [
        ([1] * 8, 1),
        ([0] * 5 + [1] * 3, 0),
        ([1, 1, 1, 0, 0, None, None, None], 1),
        ([1, 1, 0, None, None, None], None),
        ([1, 0], None),
        ([1, None], 1),
        ([None] * 8, None),
        ([], None),
    ],
)
def test_majority(group: list, verdict: int | None):
    assert majority(group) == verdict


def test_both_bounds_of_the_agreement_count():
    group = [1] * 5 + [0] * 3
    assert is_usable(group, 1, 1.0, bounds=(0.625, 0.625), consistent=True)
    assert not is_usable(group, 1, 1.0, bounds=(0.63, 0.99), consistent=True)
    assert not is_usable(group, 1, 1.0, bounds=(0.51, 0.62), consistent=True)


def test_votes_earn_by_the_majority():
    assert [vote_reward(vote, 1) for vote in (1, 0, None)] == [1.0, 0.0, -1.0]
    assert [vote_reward(vote, 0) for vote in (1, 0, None)] == [0.0, 1.0, -1.0]


Y, N, X = 1, 0, None
VERDICTS = [
    #  votes                     absent  no  first  one voter
    ([Y, Y, N, N, X, X, X, X], (X, X, X, Y)),  # more are invalid than say either
    ([N, Y, Y, N, X, X], (X, N, N, N)),
    ([X, Y, N, N, Y, X], (X, N, Y, X)),
    ([N, N, N, N, Y, Y, Y, Y], (X, N, N, N)),
    ([Y, N], (X, N, Y, Y)),
    ([N, Y, Y, Y, Y, Y, N, N], (Y, Y, Y, N)),
    ([Y, Y, Y, Y, X, X, X, X], (Y, N, Y, Y)),  # the paper asks more than half of all votes for a YES
    ([Y, Y, Y, N, N, X, X, X], (Y, N, Y, Y)),
    ([X, Y, Y, Y, Y, Y, X, N], (Y, Y, Y, X)),
    ([N, X, N, N, Y, X], (N, N, N, N)),
    ([X, X], (X, X, X, X)),
    ([X], (X, X, X, X)),
    ([], (X, X, X, X)),
]
"""Worked by hand: the verdict of a group by each treatment of a tie, and by its first voter alone."""


@pytest.mark.parametrize(("group", "verdicts"), VERDICTS)
def test_every_way_to_a_verdict(group: list, verdicts: tuple):
    options = [{"vote_tie": tie} for tie in ("absent", "no", "first")] + [{"verdict": "first"}]
    assert tuple(verdict_of(group, SelfPlayConfig(**option)) for option in options) == verdicts


def test_what_an_invalid_vote_earns():
    assert [vote_reward(vote, 1, 0.0) for vote in (1, 0, None)] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="less than or equal to 0"):
        SelfPlayConfig(invalid_vote_reward=0.5)


@pytest.mark.parametrize(
    ("group", "rule", "consistent", "usable"),
    [
        ([1] * 5 + [0] * 3, 1.0, True, True),
        ([1] * 5 + [0] * 3, 0.0, True, False),
        ([1] * 5 + [0] * 3, 0.0, False, True),
        ([0] * 7 + [1], 0.0, True, True),
        ([1] * 8, 1.0, True, False),  # no disagreement
        ([1] * 4 + [0] * 4, 1.0, True, False),  # no majority
        ([1] * 7 + [None], 1.0, True, False),  # the valid ones all agree
        ([1, 1, 0, None, None, None], 1.0, True, False),  # most are invalid
        ([1, 1, 1, 0, None, None], 1.0, True, True),
        ([], 1.0, False, False),
    ],
)
def test_usable_groups(group: list, rule: float, consistent: bool, usable: bool):
    assert is_usable(group, majority(group), rule, bounds=(0.51, 0.99), consistent=consistent) is usable


@settings(max_examples=300)
@given(votes)
def test_any_votes(group: list):
    verdict = majority(group)
    valid = [vote for vote in group if vote is not None]
    if verdict is not None:
        assert valid.count(verdict) > valid.count(1 - verdict)
        assert agreement(group, verdict) == pytest.approx(valid.count(verdict) / len(valid))
        assert len(group) - len(valid) <= valid.count(verdict)
    assert 0 <= agreement(group, verdict) <= 1
    assert all(vote_reward(vote, verdict) in (-1.0, 0.0, 1.0) for vote in group)
    if is_usable(group, verdict, 1.0, bounds=(0.51, 0.99), consistent=True):
        assert verdict == 1
        assert 0 in group
