"""Rectangles in tensors: what a run of a flattened tensor is made of, and where one rectangle lies in others.

An optimizer that is sharded over data-parallel ranks cuts flattened parameters anywhere. A checkpoint that any layout
can read knows rectangles of whole tensors: a run is a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle: where it begins in a tensor, and how far it goes."""

    start: Shape
    size: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.size)


def run_boxes(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The boxes that elements `start` to `stop` of a row-major tensor consist of, in their order.

    There are at most two for every dimension but the first, and one.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    (top, before), (bottom, after) = divmod(start, row), divmod(stop, row)
    if top == bottom:
        yield from _in_row(top, shape, before, after)
        return
    if before:
        yield from _in_row(top, shape, before, row)
        top += 1
    if top < bottom:
        yield Box((top, *(0 for _ in shape[1:])), (bottom - top, *shape[1:]))
    yield from _in_row(bottom, shape, 0, after)


def _in_row(row: int, shape: Shape, start: int, stop: int) -> Iterator[Box]:
    for box in run_boxes(shape[1:], start, stop):
        yield Box((row, *box.start), (1, *box.size))


class Overlaps:
    """Boxes of one tensor, to find out which of them others overlap."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._starts = np.array([box.start for box in boxes], np.int64)
        self._stops = self._starts + np.array([box.size for box in boxes], np.int64)

    def of(self, box: Box) -> Iterator[tuple[int, Box, Box]]:
        """For each that overlaps: its number, and the part in common as seen from its start and from `box`."""
        start = np.array(box.start)
        low = np.maximum(self._starts, start)
        high = np.minimum(self._stops, start + np.array(box.size))
        for number in np.flatnonzero((low < high).all(1)):
            size = _shape(high[number] - low[number])
            yield (
                int(number),
                Box(_shape(low[number] - self._starts[number]), size),
                Box(_shape(low[number] - start), size),
            )


def _shape(numbers: np.ndarray) -> Shape:
    return tuple(int(number) for number in numbers)
