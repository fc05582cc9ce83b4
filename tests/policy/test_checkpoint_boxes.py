"""Rectangles: a run of a flattened tensor is cut into boxes that hold its elements in order, and found again."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.policy.checkpoint.boxes import Box, Overlaps, run_boxes

pytestmark = pytest.mark.unit

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int]]:
    """A shape, and where its elements are cut into runs."""
    shape = draw(shapes)
    numel = math.prod(shape)
    return shape, sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=4))})


def taken(whole: torch.Tensor, box: Box) -> torch.Tensor:
    return whole[tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))]


@given(runs())
def test_the_boxes_of_a_run_hold_its_elements_in_order(cut: tuple[tuple[int, ...], list[int]]) -> None:
    shape, bounds = cut
    whole = torch.arange(math.prod(shape)).view(shape)
    for start, stop in pairwise(bounds):
        boxes = list(run_boxes(shape, start, stop))
        found = torch.cat([taken(whole, box).flatten() for box in boxes])
        assert found.tolist() == list(range(start, stop))
        assert len(boxes) <= 2 * len(shape) - 1


@given(runs(), st.data())
def test_boxes_cut_one_way_are_filled_from_boxes_cut_another(
    cut: tuple[tuple[int, ...], list[int]], data: st.DataObject
) -> None:
    shape, bounds = cut
    whole = torch.arange(math.prod(shape)).view(shape)
    stored = [box for a, b in pairwise(bounds) for box in run_boxes(shape, a, b)]
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
    overlaps = Overlaps(stored)
    for box in run_boxes(shape, start, stop):
        target = torch.full(box.size, -1)
        for number, there, here in overlaps.of(box):
            taken(target, here).copy_(taken(taken(whole, stored[number]), there))
        assert torch.equal(target, taken(whole, box))
