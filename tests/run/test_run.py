"""What a run does where engines ask for weights that nobody kept. Engines and learner are stood in for."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from spell_megatron.base.placement import Phase
from spell_megatron.config import load_config
from spell_megatron.corpus import ClusterSampler
from spell_megatron.rollout.engine import EngineError, WeightsWanted
from spell_megatron.run.driver import _warn_of_rare_visits
from spell_megatron.run.run import Run
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


def test_a_measurement_that_wants_weights_gets_those_that_it_measures() -> None:
    story = Story(WeightsWanted("none holds them"))
    assert story.run.measure(5) == {"heldout/mean": 0.5}
    assert story.told == [Phase.GENERATE, Phase.RESYNC, ("weights", 5), Phase.GENERATE]


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
