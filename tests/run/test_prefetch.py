"""Plays on a thread behind the loop: their order, how far they run ahead, and how they end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.run.preemption import Stop
from spell_megatron.run.prefetch import Prefetcher

pytestmark = pytest.mark.unit

PATIENCE = 30
"""Seconds after which what should happen has not."""


@contextmanager
def opened(play, ahead: int, last: int) -> Iterator[Prefetcher]:
    plays = Prefetcher(play, ahead=ahead, last=last)
    try:
        yield plays
    finally:
        plays.close()


@pytest.mark.long
@settings(max_examples=60)
@given(
    ahead=st.integers(0, 3),
    speeds=st.lists(st.tuples(st.sampled_from([0, 0.001, 0.003]), st.sampled_from([0, 0.001, 0.003])), min_size=6),
)  # fmt: skip
def test_plays_keep_their_order_and_their_distance(ahead: int, speeds: list[tuple[float, float]]) -> None:
    """Whatever takes how long: one play at a time, in order, by weights at most `ahead` updates behind."""
    version, busy, seen = 0, 0, []

    async def play(step: int) -> int:
        nonlocal busy
        busy += 1
        assert busy == 1
        seen.append((step, version))
        await asyncio.sleep(speeds[step - 1][0])
        busy -= 1
        return step * 10

    with opened(play, ahead, len(speeds)) as plays:
        for step, (_, update_seconds) in enumerate(speeds, start=1):
            assert plays.play(step) == step * 10
            time.sleep(update_seconds)
            version = step
    assert [step for step, _ in seen] == list(range(1, len(speeds) + 1))
    assert all(step - 1 - ahead <= made_by <= step - 1 for step, made_by in seen)


def test_the_next_play_goes_on_while_the_loop_is_busy_and_the_one_after_it_does_not() -> None:
    begun = [threading.Event() for _ in range(5)]

    async def play(step: int) -> int:
        begun[step].set()
        return step

    with opened(play, 1, 4) as plays:
        plays.play(1)
        assert begun[2].wait(PATIENCE)
        plays.run(asyncio.sleep(0.01))
        assert not begun[3].is_set()
        plays.play(2)
        assert begun[3].wait(PATIENCE)


def test_without_distance_nothing_overlaps() -> None:
    begun = []

    async def play(step: int) -> int:
        begun.append(step)
        return step

    with opened(play, 0, 4) as plays:
        for step in (1, 2):
            plays.play(step)
            plays.run(asyncio.sleep(0.005))
            assert begun == list(range(1, step + 1))


def test_nothing_is_played_beyond_the_last_step() -> None:
    begun = []

    async def play(step: int) -> int:
        begun.append(step)
        return step

    with opened(play, 5, 3) as plays:
        assert [plays.play(step) for step in (1, 2, 3)] == [1, 2, 3]
        plays.run(asyncio.sleep(0.005))
    assert begun == [1, 2, 3]


def test_a_play_that_fails_is_the_last_one() -> None:
    begun = []

    async def play(step: int) -> int:
        begun.append(step)
        if step == 2:
            raise LookupError("starved")
        return step

    with opened(play, 2, 5) as plays:
        assert plays.play(1) == 1
        for step in (2, 3):
            with pytest.raises(LookupError, match="starved"):
                plays.play(step)
    assert begun == [1, 2]


def test_a_stop_ends_the_play_that_runs_ahead_and_keeps_the_one_before() -> None:
    stop, running, ended = Stop(), threading.Event(), []

    async def play(step: int) -> int:
        if step == 1:
            return 1
        running.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(step)
        return step

    with opened(lambda step: stop.race(play(step)), 1, 5) as plays:
        assert plays.play(1) == 1
        assert running.wait(PATIENCE)
        stop.ask("SIGUSR1")
        assert plays.play(2) is None
    assert ended == [2]


def test_closing_cancels_what_runs_and_leaves_no_thread() -> None:
    cancelled, running = [], threading.Event()

    async def play(step: int) -> int:
        if step == 2:
            running.set()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.append(step)
                raise
        return step

    with opened(play, 1, 2) as plays:
        plays.play(1)
        assert running.wait(PATIENCE)
    assert cancelled == [2]
    assert not [thread for thread in threading.enumerate() if thread.name == "self-play"]
    plays.close()
