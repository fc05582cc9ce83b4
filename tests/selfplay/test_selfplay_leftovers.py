"""What a step does not need: dropped or carried over, within its age, and never lost uncounted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from selfplay_stage import Corpus, Engine, response, selfplay, settings
from selfplay_stage import episode as made_episode

from spell_megatron.config import ConfigError, load_config
from spell_megatron.selfplay import Episode, Play, step_metrics
from spell_megatron.selfplay.leftovers import cancel
from spell_megatron.selfplay.play import SelfPlay

pytestmark = pytest.mark.unit

CARRY = settings(leftovers="carry", max_staleness=1)


class Trained(Engine):
    """An engine whose weights change after so many requests of a step, in the middle of a completion."""

    def __init__(self, delay: float = 0.001) -> None:
        super().__init__(delay=delay)
        self.version, self.changes_at = 0, -1

    def step(self, version: int, changes_after: int | None) -> None:
        self.version = version
        self.changes_at = -1 if changes_after is None else self.requests + changes_after

    def _rollout(self, *args, **options):
        rollout = replace(super()._rollout(*args, **options), version=self.version)
        if self.requests >= self.changes_at >= 0:
            self.version, self.changes_at = self.version + 1, -1
            rollout = replace(rollout, updates=((len(rollout.tokens) // 2 + 1, self.version),))
        return rollout


def played(
    room: SelfPlay,
    engine: Trained,
    steps: Sequence[int | None],
    begin: int = 1,
    journal: Callable = lambda s: (),
) -> list[Play]:
    """Steps one behind the learner; the new weights come after so many requests, or (None) between two steps."""

    async def run() -> list[Play]:
        plays = []
        for step, changes_after in enumerate(steps, start=begin):
            engine.step(max(0, step - 2), changes_after if step > 1 else None)
            plays.append(await room.play(step, finished=journal(step)))
        return plays

    return asyncio.run(run())


def check_sums(plays: Sequence[Play]) -> None:
    for play in plays:
        t = play.tally
        came, went = t.begun + t.brought + t.journaled, t.used + t.aborted + t.unused + t.carried + t.expired
        assert came == went
        assert t.used == len(play.episodes)
        assert step_metrics(play)["episodes/carried"] == t.carried
    for before, after in pairwise(plays):
        assert after.tally.brought == before.tally.carried


def check_order(plays: Sequence[Play]) -> None:
    """Every cluster and task that the corpus gives is used once, in its order."""
    used = [(e.cluster, e.task) for play in plays for e in play.episodes]
    assert used == [(cluster.id, task) for cluster, task in Corpus().draw(len(used))]


class Costly(Corpus):
    """What it gives has to be tokenised; counts how often it was."""

    drawn = 0

    def draw(self, n: int) -> list:
        self.drawn += n
        return super().draw(n)


@pytest.mark.parametrize("leftovers", ["abort", "carry"])
def test_the_corpus_is_wound_back_without_a_second_draw(leftovers: str) -> None:
    engine, clusters = Trained(), Costly()
    room = selfplay(replace(CARRY, leftovers=leftovers), generator=engine, clusters=clusters)
    plays = played(room, engine, [0, 5, None])
    check_order(plays)
    used, rounds = sum(len(play.episodes) for play in plays), sum(play.rounds for play in plays)
    assert used == clusters.position < clusters.drawn
    assert clusters.drawn == rounds * CARRY.round_questions


def check_ages(plays: Sequence[Play], bound: int) -> None:
    for play in plays:
        for episode in play.episodes:
            assert min(episode.versions) >= play.step - 1 - bound
            assert episode.step == play.step
            assert [e.index for e in play.episodes if e.round == 0][:2] == [0, 1]


@pytest.mark.long
@pytest.mark.parametrize("leftovers", ["abort", "carry"])
@examples(max_examples=12)
@given(changes=st.lists(st.one_of(st.none(), st.integers(0, 200)), min_size=4, max_size=4))
def test_counts_add_up_and_nothing_is_too_old(leftovers: str, changes: list[int | None]) -> None:
    engine = Trained()
    room = selfplay(replace(CARRY, leftovers=leftovers), generator=engine)
    plays = played(room, engine, changes)
    check_sums(plays)
    check_order(plays)
    check_ages(plays, 1)
    dropped = sum(p.tally.aborted + p.tally.unused for p in plays)
    carried = sum(p.tally.carried for p in plays)
    assert (dropped == 0 < carried) if leftovers == "carry" else (carried == 0 < dropped)


@pytest.mark.long
def test_what_is_carried_is_not_asked_for_again() -> None:
    engine = Trained()
    plays = played(selfplay(CARRY, generator=engine), engine, [0] * 5)
    check_sums(plays)
    assert any(e.begun == play.step - 1 for play in plays for e in play.episodes)
    assert all(e.begun is None or e.begun < play.step for play in plays for e in play.episodes)


@pytest.mark.long
def test_what_is_too_old_is_asked_for_again() -> None:
    """Where new weights come only between two steps, whatever the last step left over has seen none of them."""
    engine = Trained()
    plays = played(selfplay(CARRY, generator=engine), engine, [None] * 4)
    check_sums(plays)
    check_ages(plays, 1)
    # The second step is played by version 0 as the first was; from then on a leftover is a version too old.
    assert plays[1].tally.expired == 0 < plays[1].tally.brought
    for play in plays[2:]:
        assert play.tally.expired == play.tally.brought > 0


@pytest.mark.long
def test_every_used_episode_is_told_of_in_its_step_and_replays_from_there() -> None:
    engine, told = Trained(), []
    room = selfplay(CARRY, generator=engine, on_episode=told.append, clusters=Corpus(2))
    plays = played(room, engine, [0] * 4)

    def journal(step: int) -> list[Episode]:
        return [Episode.from_dict(json.loads(json.dumps(e.to_dict()))) for e in told if e.step == step]

    for play in plays:
        assert all(episode in told for episode in play.episodes)
    assert any(episode.begun and episode.history for episode in told)  # memory has moved on since it was read
    assert any(rollout.updates for episode in told for _, rollout in episode.rollouts())
    again = Trained()
    replayed = played(selfplay(CARRY, generator=again, clusters=Corpus(2)), again, [0] * 4, journal=journal)
    assert [p.episodes for p in replayed] == [p.episodes for p in plays]
    assert [p.batch for p in replayed] == [p.batch for p in plays]
    assert again.requests == 0
    check_sums(replayed)


def test_an_episode_is_of_all_weights_that_sampled_a_token_of_it() -> None:
    answer = response(1.0)
    made = replace(answer.rollout, version=3, updates=((1, 4), (2, 6)))
    one = made_episode(0, "kept", "doc_mc", 0.5, [replace(answer, rollout=made)])
    assert replace(one, asked=None).versions == {3, 4, 6}


def test_leftovers_survive_a_restart_as_what_to_ask_for() -> None:
    engine = Trained()
    room = selfplay(CARRY, generator=engine)
    [first] = played(room, engine, [None])
    assert first.tally.carried
    other, rest = selfplay(CARRY, generator=(fresh := Trained())), []
    other.restore(json.loads(json.dumps(room.state())))
    rest = played(other, fresh, [0, 0], begin=2)
    check_order([first, *rest])
    assert rest[0].tally.brought == 0


def test_a_journal_of_weights_that_are_too_old_is_not_used() -> None:
    engine = Trained()
    [stale] = played(selfplay(settings(), generator=engine), engine, [None], begin=4)  # version 2 in step 4
    asked = [len(e.versions) for e in stale.episodes]
    assert asked
    on_policy, again = selfplay(settings(), generator=(fresh := Trained())), stale.episodes
    fresh.version = 3
    play = asyncio.run(on_policy.play(4, finished=again))
    assert play.tally.journaled == 0
    lax = selfplay(settings(max_staleness=1), generator=fresh)
    assert asyncio.run(lax.play(4, finished=again)).tally.journaled == len(again)


def test_nothing_runs_on_after_an_error() -> None:
    class Broken(Trained):
        async def generate(self, *args, **options):
            if self.requests > 150:
                raise ConnectionError("gone")
            return await super().generate(*args, **options)

    async def steps() -> None:
        engine = Broken()
        room = selfplay(CARRY, generator=engine)
        for step in range(1, 9):
            engine.step(step - 1, None)
            await room.play(step)

    async def scene() -> int:
        with pytest.raises(ConnectionError, match="gone"):
            await steps()
        return len(asyncio.all_tasks())

    assert asyncio.run(scene()) == 1


def test_an_interrupt_is_not_taken_for_the_end_of_what_is_cancelled() -> None:
    """Ctrl-C cancels the task that plays, perhaps while that waits for its leftovers to end."""

    async def lingering() -> Episode:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
        raise AssertionError("nobody sets the event")

    async def scene() -> None:
        work = asyncio.create_task(lingering())
        await asyncio.sleep(0)
        play = asyncio.create_task(cancel([work]))
        await asyncio.sleep(0)
        play.cancel()
        with pytest.raises(asyncio.CancelledError):
            await play
        assert work.done()

    asyncio.run(scene())


def test_a_whole_round_leaves_nothing_to_carry():
    carrying = [
        "selfplay.leftovers=carry",
        "selfplay.max_staleness=1",
        "policy.loss.importance_cap=2.0",
        "rollout.placement=disaggregated",
    ]
    load_config("paper-16k", [*carrying, "selfplay.whole_rounds=false"])
    with pytest.raises(
        ConfigError, match=r"set selfplay\.whole_rounds=false, or leave selfplay\.leftovers=abort"
    ):
        load_config("paper-16k", carrying)
