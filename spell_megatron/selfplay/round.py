"""The episodes of one round: under way, finished in any order, and counted in their own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from operator import itemgetter
from typing import Any

from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.leftovers import Leftover, cancel


class Round:
    """Episodes by their places: finished (`done`), under way, or waiting to begin.

    What counts is the unbroken row of finished ones from the first place on, up to the one with which `wanted` are
    kept: the first `end` places. A `whole` round goes on to its last place all the same.
    """

    def __init__(self, done: Sequence[Episode | None], wanted: int, whole: bool = False) -> None:
        self.done, self._wanted, self._whole = list(done), wanted, whole
        self.end = self._kept = 0
        self._under_way: dict[asyncio.Task[Episode], int] = {}
        self._oldest: dict[int, int] = {}

    @property
    def is_full(self) -> bool:
        return self._kept >= self._wanted

    @property
    def running(self) -> int:
        """Episodes under way."""
        return len(self._under_way)

    def waiting(self) -> Iterator[int]:
        """Places where nothing is finished or under way, in their order."""
        busy = set(self._under_way.values())
        return iter([i for i, episode in enumerate(self.done) if episode is None and i not in busy])

    def begin(self, place: int, work: Coroutine[Any, Any, Episode], oldest: int) -> None:
        """Start an episode, none of whose rollouts will be of weights before `oldest`."""
        self.take(place, Leftover(asyncio.create_task(work), oldest))

    def take(self, place: int, left: Leftover) -> None:
        """Go on with what is under way already."""
        assert isinstance(left.work, asyncio.Task)
        self._under_way[left.work], self._oldest[place] = place, left.oldest

    def advance(self) -> bool:
        """Count what is finished at the end of the row; whether the round is over."""
        while not self._is_over and (episode := self.done[self.end]) is not None:
            self._kept, self.end = self._kept + episode.kept, self.end + 1
        return self._is_over

    @property
    def _is_over(self) -> bool:
        return self.end == len(self.done) or (self.is_full and not self._whole)

    async def arrivals(self) -> list[tuple[int, Episode]]:
        """Wait until something ends. In the order of places: that of arrival is not the same twice, and decides
        which requests share a batch.

        The error of an episode is raised when none that ended well is left to hand out: they are finished work.
        """
        ended, _ = await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in ended if task.cancelled() or task.exception() is not None]
        arrived = [(self._under_way.pop(task), task.result()) for task in ended.difference(failed)]
        if not arrived:
            min(failed, key=self._under_way.__getitem__).result()
        return sorted(arrived, key=itemgetter(0))

    def leftovers(self) -> tuple[dict[int, Episode], dict[int, Leftover]]:
        """What lies behind the end, finished and under way, by its place from there."""
        finished = {i: episode for i, episode in enumerate(self.done[self.end :]) if episode is not None}
        under_way = {
            place - self.end: Leftover(task, self._oldest[place]) for task, place in self._under_way.items()
        }
        return finished, under_way

    async def cancel(self) -> None:
        await cancel(self._under_way)
