"""Advantages equal the reference vectors and are numbers, whatever the rewards."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import VECTORS

from spell_megatron.selfplay.advantages import ADVANTAGES, standardise, standardise_by

pytestmark = pytest.mark.unit

BATCHES = json.loads((VECTORS / "advantages.json").read_text(encoding="utf-8"))
rewards = st.floats(min_value=-2, max_value=2, allow_nan=False)


@pytest.mark.parametrize("number", range(len(BATCHES)))
def test_every_vector(number: int):
    """Questioners are compared within their task over the batch, the others within their group."""
    batch = BATCHES[number]
    groups = [s["task"] if s["role"] == "questioner" else f"{s['role']} {s['uid']}" for s in batch]
    advantages = standardise_by(groups, [sample["reward"] for sample in batch])
    assert advantages == pytest.approx([sample["advantage"] for sample in batch], abs=2e-6)


def test_a_lone_sample_and_equal_rewards_have_no_advantage():
    assert standardise([]) == []
    assert standardise([0.7]) == [0.0]
    assert standardise([1.0] * 8) == [0.0] * 8


@settings(max_examples=300)
@given(st.lists(rewards, min_size=2, max_size=16))
def test_the_formula(values: list[float]):
    mean, std = statistics.mean(values), statistics.stdev(values)
    expected = [(value - mean) / (std + 1e-6) for value in values]
    assert standardise(values) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from("abc"), rewards), max_size=40))
def test_advantages_are_never_nan_and_sum_to_nothing(pairs: list[tuple[str, float]]):
    advantages = standardise_by([key for key, _ in pairs], [reward for _, reward in pairs])
    assert all(map(math.isfinite, advantages))
    assert math.fsum(advantages) == pytest.approx(0, abs=1e-6)


@settings(max_examples=300)
@given(st.lists(rewards, min_size=2, max_size=16))
def test_undivided_schemes_are_their_formulas(values: list[float]):
    mean, others = statistics.mean(values), len(values) - 1
    peers = [0] * len(values)
    centred = ADVANTAGES["centred"].compare(values, peers, peers).values
    assert centred == pytest.approx([value - mean for value in values], abs=1e-9)
    left_out = ADVANTAGES["leave_one_out"].compare(values, peers, peers).values
    against = [value - (math.fsum(values) - value) / others for value in values]
    assert left_out == pytest.approx(against, abs=1e-9)


@pytest.mark.parametrize("scheme", ADVANTAGES)
def test_samples_whose_peers_all_earned_the_same_are_counted(scheme: str):
    found = ADVANTAGES[scheme].compare([1, 1, 0, 1, 0.5], [*"aabbc"], [*"aabbc"])
    assert found.metrics == {"flat": 3 / 5}
    assert found.values[:2] == [0.0, 0.0]
