"""Ranks wait for rank 0 as long as it lives, beyond every time-out, and not much longer."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import waiting_ranks
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.policy import waiting
from spell_megatron.policy.waiting import GONE_SECONDS, Heart, MainRank, MainRankGone, Watch

SECOND = 1.0


@pytest.mark.unit
@given(st.lists(st.floats(0.01, GONE_SECONDS * 0.9), min_size=1, max_size=300))
def test_a_heart_that_beats_is_waited_for_however_long(pauses: list[float]) -> None:
    watch, now = Watch(Heart(doing="plays"), 0.0), 0.0
    for beat, pause in enumerate(pauses, start=1):
        now += pause
        assert not watch.verdict(1, now)
        watch.see(Heart(beat=beat, doing="plays"), now)
    watch.see(Heart(beat=len(pauses) + 1, reached=1), now)
    assert watch.verdict(1, now + 10 * GONE_SECONDS), "who has come is not waited for"


@pytest.mark.unit
def test_a_heart_that_stops_is_gone_and_said_to_be() -> None:
    heart = Heart(beat=3, reached=4, doing="plays step 7")
    watch = Watch(heart, 100.0)
    watch.see(replace(heart), 100.0 + GONE_SECONDS)  # seen again, the same: no beat
    assert watch.verdict(4, 100.0 + 2 * GONE_SECONDS)
    with pytest.raises(MainRankGone, match=r"not been heard of for 31 s .* it plays step 7\. .*resume"):
        watch.verdict(5, 100.0 + GONE_SECONDS + SECOND)


@pytest.mark.unit
def test_a_rank_that_has_failed_is_not_waited_for() -> None:
    watch = Watch(Heart(), 0.0)
    watch.see(Heart(beat=1, doing="starts the engines", fault="EngineError"), 1.0)
    with pytest.raises(MainRankGone, match=r"EngineError.* starts the engines; its own message says why"):
        watch.verdict(1, 1.1)


class SlowStore:
    """Answers at once, and from then on takes its time."""

    def __init__(self) -> None:
        self.asked, self.answering = 0, False

    def clone(self) -> SlowStore:
        return self

    def set_timeout(self, _: object) -> None: ...

    def get(self, _: str) -> bytes:
        self.asked, self.answering = self.asked + 1, True
        time.sleep(0.0 if self.asked == 1 else 1.0)
        self.answering = False
        return json.dumps(asdict(Heart(beat=1))).encode()


@pytest.mark.unit
def test_nobody_is_in_the_store_any_more_when_a_rank_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends while one of its threads is there aborts, now and then."""
    store = SlowStore()
    group = SimpleNamespace(WORLD=object())
    c10d = SimpleNamespace(_get_default_store=lambda: store)
    monkeypatch.setattr(waiting, "dist", SimpleNamespace(group=group, distributed_c10d=c10d))
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.3)
    rank = MainRank(SimpleNamespace(size=2, is_main=False))  # type: ignore[arg-type]
    with pytest.raises(MainRankGone):
        rank.meet()
    assert store.asked == 2 and not store.answering


@contextmanager
def two_ranks(seconds: float, *failing: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Rank 0 is at work when the block begins, and rank 1 about to wait for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", waiting_ranks.__file__, str(seconds), *failing],
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "ready\n", rank.communicate()
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.distributed
def test_a_play_may_take_far_longer_than_a_collective() -> None:
    with two_ranks(3 * waiting_ranks.TIMEOUT_SECONDS) as ranks:
        for rank in ranks:
            out, err = rank.communicate(timeout=120)
            assert (rank.returncode, out) == (0, "played 2\n"), err


@pytest.mark.distributed
def test_a_rank_0_that_is_killed_or_stopped_ends_the_others_within_a_minute() -> None:
    with two_ranks(600) as killed, two_ranks(600) as stopped:
        time.sleep(5)  # the others have seen what it does
        killed[0].send_signal(signal.SIGKILL)
        stopped[0].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for ranks in (killed, stopped):
            _, err = ranks[1].communicate(timeout=60)
            assert ranks[1].returncode == 1, err
            assert "MainRankGone: rank 0 has not been heard of" in err
            assert "it plays step 7" in err
        assert time.monotonic() - began < 60, "a promise, not a measurement: docs/rollouts.md"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (["0", "1"], "Dismissed: no question was kept; rank 0 says how the run ends"),
        (
            ["0"],
            r"Dismissed: rank 0 has given up \(SpellError\).* it plays step 7.*; rank 0 says how the run ends",
        ),
    ],
)
def test_what_ends_the_run_ends_rank_0_first(failing: list[str], said: str) -> None:
    """Rank 0 has closed what it had, and its exit code is the only one that is not 0."""
    with two_ranks(1, *failing) as ranks:
        outcomes = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 0], outcomes
    assert re.search(said, outcomes[1][1])
    closed, left = (float(out) for out, _ in outcomes)
    assert closed < left


@pytest.mark.distributed
def test_a_rank_that_fails_alone_ends_with_its_own_code_while_rank_0_is_at_work() -> None:
    with two_ranks(600, "1") as ranks:
        _, err = ranks[1].communicate(timeout=60)
        assert (ranks[1].returncode, ranks[0].poll()) == (1, None)
        assert "SpellError: its disk is full" in err
