"""What a run does where engines ask for weights that nobody kept. Engines and learner are stood in for."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest

from launchers.launch import launch
from spell_megatron.base.placement import Phase
from spell_megatron.config import ConfigError, load_config, untrainable
from spell_megatron.corpus import ClusterSampler
from spell_megatron.rollout.engine import EngineError, EngineStats, WeightsWanted
from spell_megatron.run.driver import Driver, _warn_of_rare_visits
from spell_megatron.run.preemption import Preempted, Stop
from spell_megatron.run.prefetch import Prefetcher
from spell_megatron.run.record import Journal, Metrics, RunFolder, read_metrics
from spell_megatron.run.run import Run
from spell_megatron.run.train import train
from spell_megatron.selfplay import Episode
from spell_megatron.selfplay.rewards import UNJUDGED
from spell_megatron.types import SpellError

pytestmark = pytest.mark.unit


class Story:
    """A run on one rank, and what happens in it, in its order. `failures` are raised one a use of the engines."""

    def __init__(self, *failures: Exception) -> None:
        self.told: list[Any] = []
        self._failures = list(failures)
        run = self.run = Run.__new__(Run)
        run.config = SimpleNamespace(steps=9, heldout=SimpleNamespace(every=1))  # type: ignore[assignment]
        run._main = SimpleNamespace(work=lambda doing, work: work(), meet=lambda: None)  # type: ignore[assignment]
        run.step, run._state = 4, {"clusters": 4}
        run._placement = SimpleNamespace(enter=self.told.append)  # type: ignore[assignment]
        run.learner = SimpleNamespace(engine_weights=lambda: iter(()))  # type: ignore[assignment]
        run.lead = SimpleNamespace(  # type: ignore[assignment]
            engine=SimpleNamespace(update_weights=self._update),
            play=self._play,
            measure=lambda step: self._use({"heldout/mean": 0.5}),
            record_scores=lambda step, scores: self.told.append((step, scores)),
            owes=False,
            rewind=lambda state: self.told.append(("rewind", state)),
            note=lambda text: None,
            phase=lambda name: nullcontext(),
        )

    def _use(self, result: Any) -> Any:
        if self._failures:
            raise self._failures.pop(0)
        return result

    def _play(self, step: int) -> Any:
        self.told.append(("play", step))
        return self._use(
            SimpleNamespace(play=SimpleNamespace(batch=SimpleNamespace(train=f"batch of {step}")))
        )

    def _update(self, weights: Any, version: int) -> None:
        self.told.append(("weights", version))


def test_a_play_that_wants_weights_begins_again_with_them() -> None:
    story = Story(WeightsWanted("none holds them"), WeightsWanted("nor now"))
    assert story.run.collect(5).batch == "batch of 5"
    again = [("play", 5), ("rewind", {"clusters": 4}), Phase.RESYNC, ("weights", 4), Phase.GENERATE]
    assert story.told == [Phase.GENERATE, *again, *again, ("play", 5)]


def test_work_that_ends_the_engines_every_time_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(*[WeightsWanted("none holds them")] * 1000)
    story.run.folder = RunFolder(Path("run"))
    monkeypatch.setattr(story.run, "_save", lambda: story.told.append("saved"))
    monkeypatch.setattr(story.run.lead, "report", lambda: None, raising=False)
    with pytest.raises(SpellError, match=r"lost all engines 20 times .*run/engines"):
        story.run.collect(5)
    assert story.told.count(("play", 5)) == 20
    assert story.told[-1] == "saved"


def test_a_measurement_that_wants_weights_gets_those_that_it_measures() -> None:
    story = Story(WeightsWanted("none holds them"))
    assert story.run.measure(5) == {"heldout/mean": 0.5}
    assert story.told == [Phase.GENERATE, Phase.RESYNC, ("weights", 5), Phase.GENERATE]


def test_a_sequence_that_no_stream_holds_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = load_config("toy", ["policy.stream_tokens=511", f"runs={tmp_path}"])
    with pytest.raises(ConfigError, match=r"policy\.stream_tokens=511 .*rollout\.max_model_len=512"):
        train(config)
    with pytest.raises(ConfigError, match=r"policy\.stream_tokens=511"):
        launch("toy", ["policy.stream_tokens=511", f"runs={tmp_path}"], "slurm", "cpu", dryrun=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("step", "owes", "begins"), [(0, False, True), (4, True, True), (4, False, False)])
def test_weights_that_nobody_has_measured_are_measured_first(step: int, owes: bool, begins: bool) -> None:
    story = Story()
    story.run.step, story.run.lead.owes = step, owes  # type: ignore[union-attr]
    story.run.begin()
    assert ((step, {"heldout/mean": 0.5}) in story.told) == begins


@pytest.mark.parametrize(
    ("row", "steps", "benchmarks", "owes"),
    [
        ({"heldout/mean": 0.5}, 4, False, False),
        ({"policy/loss": 0.5}, 4, False, True),  # by `resume RUN steps=4`, of a run of nine
        ({"policy/loss": 0.5}, 9, False, False),
        ({"measure/owed": 1.0}, 9, False, True),
        ({"heldout/mean": 0.5}, 4, True, True),
        ({"heldout/mean": 0.5, "eval/toy": 0.5}, 4, True, False),
    ],
)
def test_the_last_weights_are_measured_whenever_they_became_the_last(
    tmp_path: Path, row: dict[str, float], steps: int, benchmarks: bool, owes: bool
) -> None:
    driver = Driver.__new__(Driver)
    driver.run = RunFolder.create(tmp_path, "run")
    driver.settings = load_config("toy", [f"steps={steps}", "heldout.every=0"])
    driver._benchmarks = (lambda *_: None) if benchmarks else None  # type: ignore[assignment, return-value]
    driver._questions, driver.live = [object()], SimpleNamespace(note=lambda text: None)  # type: ignore[assignment, list-item]
    with ExitStack() as driver._stack:
        before = Metrics(driver.run)
        before.log(4, row)
        before.close()
        driver.begin(4)
        assert driver.owes == owes


def test_weights_are_measured_where_a_run_ends_before_the_step_that_it_had_come_to() -> None:
    story = Story()
    story.run.config.steps, story.run.config.heldout.every = 3, 0  # type: ignore[misc]
    assert story.run.measure(4) == {"heldout/mean": 0.5}
    story.run.config.steps = 9  # type: ignore[misc]
    assert story.run.measure(4) == {}


def test_a_play_that_ran_ahead_is_not_trained_on_after_a_stop() -> None:
    driver = Driver.__new__(Driver)
    driver._stop, driver._seconds = Stop(), Counter()
    driver.settings = load_config("toy")
    driver.live = SimpleNamespace(begin=lambda *_: None, phase=lambda name: None)  # type: ignore[assignment]
    driver._plays = SimpleNamespace(play=lambda step: f"play of {step}")  # type: ignore[assignment]
    assert driver.play(5) == "play of 5"
    driver._stop.ask("SIGUSR1")
    assert driver.play(6) is None


@pytest.mark.parametrize("played_on", [False, True])
def test_a_judge_who_is_back_is_asked_in_the_step_that_he_ended(tmp_path: Path, played_on: bool) -> None:
    """In an earlier step, which a resumed run makes again, other questions would make other weights than it had."""
    run = RunFolder.create(tmp_path, "run")
    for step in (3, 4) if played_on else (3,):
        journal = Journal(run, step)
        for index, outcome in enumerate(("kept", UNJUDGED, "bad_ground")):
            journal.append(Episode(step, 0, index, "c", "doc_mc", (), (), outcome=outcome))
        journal.close()
    seen: list[str] = []

    async def play(step: int, finished: list[Episode]) -> None:
        seen.extend(episode.outcome for episode in finished)

    driver = Driver.__new__(Driver)
    driver.run, driver._beginnings = run, {}
    driver.engine = SimpleNamespace(stats=EngineStats)  # type: ignore[assignment]
    driver.selfplay = SimpleNamespace(play=play, state=dict)  # type: ignore[assignment]
    driver._clusters = SimpleNamespace(visits={"toy": 1.5})  # type: ignore[assignment]
    played = asyncio.run(driver._play(3))
    assert played.metrics["visits/toy"] == 1.5
    assert seen == (["kept", UNJUDGED, "bad_ground"] if played_on else ["kept", "bad_ground"])
    assert len(Journal(run, 3).read()) == len(seen), "no question stands there twice"


def test_a_rate_that_would_become_nothing_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    changes = ["steps=9", "policy.optimizer.decay_steps=5", f"runs={tmp_path}"]
    with pytest.raises(ConfigError, match=r"steps=9 goes on after policy\.optimizer\.decay_steps=5"):
        train(load_config("toy", changes))
    assert not list(tmp_path.iterdir())
    assert not untrainable(load_config("toy", [*changes, "policy.optimizer.min_lr=1e-6"]))
    assert not untrainable(load_config("toy", [*changes, "steps=5"]))


def test_a_run_that_has_yet_to_measure_its_last_weights_is_not_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story = Story()
    story.run.lead.owes = True  # type: ignore[union-attr]
    monkeypatch.setattr(story.run, "_stopped", lambda: Preempted("saved"))
    with pytest.raises(Preempted, match="saved"):
        story.run.finish()


def test_a_stop_leaves_what_is_measured_and_a_resumed_run_makes_it_up(tmp_path: Path) -> None:
    stop, ended = Stop(), list[str]()
    plays = Prefetcher(lambda step: stop.race(asyncio.sleep(60)), ahead=1, last=9)

    async def measuring(step: int) -> dict[str, float]:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("left")
        return {"heldout/mean": 0.25}

    driver = Driver.__new__(Driver)
    driver._stop, driver._plays, driver._seconds = stop, plays, Counter()
    driver._measure = measuring  # type: ignore[method-assign]
    driver.live = SimpleNamespace(phase=lambda name: None, note=lambda text: None)  # type: ignore[assignment]
    ahead = plays._submit(plays._after(None, 1))  # a play that runs ahead races beside it
    Timer(0.2, stop.ask, ("SIGUSR1",)).start()
    scores = driver.measure(4)
    assert ended == ["left"]
    assert ahead.result(5) is None, "one stop ends both"
    plays.close()
    assert driver.owes

    driver.run = RunFolder(tmp_path)
    driver.metrics = Metrics(driver.run)
    driver.metrics.log(4, {"policy/loss": 0.5, **scores})
    assert read_metrics(driver.run)[0]["measure/owed"] == 1
    driver.record_scores(4, {"heldout/mean": 0.25})
    driver.metrics.close()
    [row] = read_metrics(driver.run)
    assert {name: row[name] for name in row if name != "time"} == {
        "step": 4,
        "policy/loss": 0.5,
        "heldout/mean": 0.25,
    }
    assert not driver.owes


def test_any_other_fault_of_the_engines_ends_the_play(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(EngineError("all engines are lost"))
    monkeypatch.setattr(story.run, "_save", lambda: story.told.append("saved"))
    monkeypatch.setattr(story.run.lead, "report", lambda: None, raising=False)
    with pytest.raises(SpellError, match="all engines are lost"):
        story.run.collect(5)
    assert story.told == [Phase.GENERATE, ("play", 5), "saved"]


@pytest.mark.parametrize(
    ("clusters", "cap", "warned"), [(60, "null", False), (5000, "null", True), (5000, "60", False)]
)
def test_a_run_that_meets_its_clusters_less_than_once_says_so(
    caplog: pytest.LogCaptureFixture, clusters: int, cap: str, warned: bool
) -> None:
    config = load_config(
        "toy", [f"corpus.toy_clusters={clusters}", f"corpus.sources=[{{path: toy, clusters: {cap}}}]"]
    )
    _warn_of_rare_visits(config, ClusterSampler(config.corpus, len, 0))
    assert ("history memory will hardly act" in caplog.text) == warned
