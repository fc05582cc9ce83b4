"""Samples of older weights: how old they are, what their weights come to, which groups are left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spell_megatron.policy.mismatch import groups_beyond, mismatch
from spell_megatron.policy.scores import Scores
from spell_megatron.policy.staleness import importance, staleness
from spell_megatron.rollout.engine import versions_of
from spell_megatron.types import Group, Sample, TrainBatch, version_spans

pytestmark = pytest.mark.unit


def batch(*groups: list[tuple[list[float], int | None, *tuple[tuple[int, int], ...]]]) -> TrainBatch:
    """Groups of samples, each the engine's log-probs, a version, and the updates in its middle."""
    return TrainBatch(
        tuple(
            Group(
                [1],
                tuple(
                    Sample([5] * len(lp), [1.0] * len(lp), lp, version, tuple(updates))
                    for lp, version, *updates in group
                ),
            )
            for group in groups
        )
    )


def scores(*groups: list[list[float]]) -> Scores:
    learned = [[np.array(sample, dtype=np.float32) for sample in group] for group in groups]
    return Scores(learned, learned)


def test_ages_are_counted_in_updates_token_by_token() -> None:
    made = batch([([-1.0], 4), ([-1.0, -2.0], 3)], [([-1.0], 4), ([-2.0], 4)])
    ages = {"staleness/mean": 0.4, "staleness/max": 1.0, "staleness/mixed": 1.0, "staleness/continued": 0.0}
    assert staleness(made, 4) == ages
    assert staleness(made, 6)["staleness/max"] == 3.0
    assert staleness(batch([([], None)]), 4) == {}
    continued = batch([([-1.0, -1.0, -1.0, -1.0], 1, (1, 3), (3, 4))], [([-1.0], 4), ([-1.0], 4)])
    ages = {"staleness/mean": 5 / 6, "staleness/max": 3.0, "staleness/mixed": 1.0, "staleness/continued": 1.0}
    assert staleness(continued, 4) == pytest.approx(ages)


def test_spans_of_versions_cover_a_completion() -> None:
    sample = Sample([5, 6, 7], [1.0] * 3, [-1.0] * 3, 2, ((1, 4),))
    assert version_spans(sample) == [(2, 0, 1), (4, 1, 3)]
    assert version_spans(Sample([5], [1.0])) == []
    assert versions_of([("2", 0, 1), ("4", 1, 3)], 3) == (2, ((1, 4),))
    assert versions_of([("7", 0, 3)], 3) == (7, ())
    for wrong in (
        [],
        [("2", 0, 1)],
        [("2", 0, 1), ("4", 2, 3)],
        [("4", 0, 1), ("2", 1, 3)],
        [("default", 0, 3)],
    ):
        with pytest.raises(ValueError):
            versions_of(wrong, 3)


def test_importance_weights_are_truncated_token_by_token() -> None:
    made = batch([([-1.0, -3.0], 1)], [([-2.0], 1)])
    learned = scores([[-1.5, -1.0]], [[-2.0]])
    ratios = [math.exp(-0.5), math.exp(2.0), 1.0]
    values = importance(made, learned, 2.0)
    assert values["importance/weight"] == pytest.approx((ratios[0] + 2.0 + ratios[2]) / 3)
    assert values["importance/truncated"] == pytest.approx(1 / 3)
    assert importance(made, learned, 10.0)["importance/weight"] == pytest.approx(sum(ratios) / 3)
    assert importance(made, learned, None) == {}
    assert importance(batch([([], None)]), scores([[-1.0]]), 2.0) == {}


def test_groups_beyond_the_bound_are_found_by_their_mean() -> None:
    made = batch([([-1.0, -1.0], 1)], [([-1.0], 1), ([-1.0], 1)], [([], None)], [([-1.0], 1)], [([-1.0], 1)])
    learned = scores([[-1.2, -1.0]], [[-1.0], [-0.6]], [[-9.0]], [[math.nan]], [[-1.0]])
    assert groups_beyond(made, learned, 0.15, 1) == {1, 3}  # what is not a number is beyond every bound
    assert groups_beyond(made, learned, 0.05, 1) == {0, 1, 3}
    left = made.without(groups_beyond(made, learned, 0.15, 1))
    assert left.groups == (made.groups[0], made.groups[2], made.groups[4])
    assert left.response_tokens == made.response_tokens - 3


def test_only_tokens_of_the_learners_own_weights_are_held_against_an_engine() -> None:
    """Others differ because the policy has moved on, which is no fault of numerics."""
    made = batch([([-1.0, -1.0], 3, (1, 4)), ([-1.0], 3)], [([-1.0], 3)])
    learned = scores([[-9.0, -1.3], [-9.0]], [[-9.0]])
    assert groups_beyond(made, learned, 0.5, 4) == set()
    assert groups_beyond(made, learned, 0.2, 4) == {0}
    assert mismatch(made, learned, ["a", "b"], 4)["mismatch/newest"] == pytest.approx(0.3)
    assert "mismatch/newest" not in mismatch(made, learned, ["a", "b"], 5)
    few = batch([([-1.0], 4), ([-1.0] * 200, 3)])
    assert "mismatch/newest" not in mismatch(few, scores([[-9.0], [-1.0] * 200]), ["a"], 4)


def test_the_gap_of_the_newest_weights_stands_apart() -> None:
    made = batch([([-1.0], 3), ([-1.0], 4)], [([-1.0], 4)])
    values = mismatch(made, scores([[-2.0], [-1.1]], [[-1.3]]), ["a", "b"], 4)
    assert values["mismatch/newest"] == pytest.approx(0.2)
    assert values["mismatch/mean"] == pytest.approx((1.0 + 0.1 + 0.3) / 3)
    made = batch([([-1.0, -1.0, -1.0], 3, (2, 4))], [([-1.0], 3)])
    values = mismatch(made, scores([[-2.0, -2.0, -1.5]], [[-3.0]]), ["a", "b"], 4)
    assert values["mismatch/newest"] == pytest.approx(0.5)
