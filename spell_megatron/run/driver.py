"""What rank 0 alone does: engine, self-play, measurements, records. The other ranks hold a part of the learner.

Its parts are built in the order that they need each other and taken down in reverse. Self-play and measuring
run on a thread of their own (`prefetch`); everything else is called, and runs, on the main thread.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spell_megatron import config
from spell_megatron.base.topology import Topology
from spell_megatron.corpus import ClusterSampler, StaticQuestions, load_heldout
from spell_megatron.policy.learner import Update
from spell_megatron.policy.mismatch import mismatch
from spell_megatron.policy.staleness import importance, staleness
from spell_megatron.rollout.engine import Engine, EngineStats
from spell_megatron.rollout.keeping import Keeping
from spell_megatron.rollout.kinds import ENGINES, EngineOrder
from spell_megatron.run.preemption import Stop, attempt
from spell_megatron.run.prefetch import Prefetcher
from spell_megatron.run.record import (
    Archive,
    Console,
    Journal,
    Live,
    Metrics,
    RunFolder,
    logging_to,
    read_metrics,
    write_report,
)
from spell_megatron.run.record.folder import replace_text, writing
from spell_megatron.selfplay import Episode, Play, SelfPlay, accuracy, known, prompts_of, step_metrics
from spell_megatron.selfplay.batch import Batch
from spell_megatron.selfplay.ports import Judge
from spell_megatron.selfplay.rewards import UNJUDGED
from tokenizer.chat import ChatTokenizer

_log = logging.getLogger(__name__)
_OWED, _MEAN = "measure/owed", "heldout/mean"
Measurement = Callable[[Engine, ChatTokenizer, Path], Coroutine[Any, Any, dict[str, float]]]
"""Scores of what an engine holds; answers and tables go to the folder."""


@dataclass(frozen=True, slots=True)
class Played:
    """A step of self-play, and what was so when it ended: the next one may have begun since."""

    play: Play
    state: dict[str, Any]
    """State of self-play: where the next step begins."""
    metrics: dict[str, float]


class Driver:
    """Plays, measures and records one run in its folder. `stack` takes it down; `stop` ends a play at once."""

    def __init__(
        self,
        settings: config.Config,
        run: RunFolder,
        model: Path,
        stack: ExitStack,
        found: Topology,
        *,
        stop: Stop,
        benchmarks: Measurement | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.settings, self.run, self._benchmarks = settings, run, benchmarks
        console = stack.enter_context(Console(settings.steps))
        stack.enter_context(logging_to(run, console.terminal))
        self.live: Live = console
        self.live.note(f"model {model}, run folder {run.path}")
        self._seconds: Counter[str] = Counter()
        self._beginnings: dict[int, tuple[float, EngineStats]] = {}
        self.codec = ChatTokenizer.load(model, settings.model.thinking)
        self.prompts = prompts_of(settings)
        self._questions = known(load_heldout(settings.heldout))
        console.phase("reading the corpus")
        clusters = ClusterSampler(settings.corpus, self.codec.count, settings.seed, run.corpus)
        replace_text(run.sources, json.dumps(clusters.facts))
        self._clusters = clusters
        _warn_of_rare_visits(settings, clusters)
        console.phase("starting engines")
        self.engine = ENGINES.find(settings.rollout.kind, "rollout.kind").make(
            EngineOrder(
                model=model,
                settings=settings.rollout,
                seed=settings.seed,
                stop=self.codec.eos_ids,
                scratch=run.engine_cache,
                logs=run.path / "engines",
                found=found,
                tells_experts=settings.policy.router_replay,
                keeping=_keeping(settings, run),
            )
        )
        stack.callback(self.engine.close)
        self.selfplay = SelfPlay(
            settings.selfplay,
            prompts=self.prompts,
            codec=self.codec,
            generator=self.engine,
            clusters=StaticQuestions(clusters) if settings.selfplay.static_questions else clusters,
            seed=settings.seed,
            max_model_len=settings.rollout.max_model_len,
            judge=judge,
            on_episode=self._on_episode,
        )
        self._stop = stop
        self._plays = Prefetcher(
            lambda step: stop.race(self._play(step)),
            ahead=settings.selfplay.max_staleness,
            last=settings.steps,
        )
        stack.callback(self._plays.close)
        self._stack = stack

    def begin(self, step: int) -> None:
        """Start the records after `step`, forgetting rows of steps that will be made again."""
        after = step or -1  # before the first step, its measurement is made again, too
        self.metrics = Metrics(self.run, self.settings.record.wandb, after=after)
        self._stack.callback(self.metrics.close)
        self._archive = Archive(self.run, self.settings.record)
        self._stack.callback(self._archive.close)
        self._archive.begin(step)
        row = next((row for row in read_metrics(self.run) if row["step"] == step), {})
        due = bool(self._questions) and row.get(_MEAN) is None
        due |= self._benchmarks is not None and not any(name.startswith("eval/") for name in row)
        self.owes = bool(row.get(_OWED)) or (step >= self.settings.steps and due)
        if step:
            self.live.note(f"resumed after step {step}")

    def play(self, step: int) -> Played | None:
        """One step of self-play, begun now or earlier; later ones begin as far as they may run ahead.

        None where the run was asked to stop first. Whatever ends a play, its finished episodes are on disk.
        """
        self.live.begin(step, self.settings.selfplay.questions)
        with self.phase("play"):
            played = self._plays.play(step)
        # After a stop one that had run ahead to its end is not begun to train on.
        return None if self._stop.asked else played

    def rewind(self, state: dict[str, Any]) -> None:
        """Have a play that broke off begin again, from a `Played.state`; its finished episodes are on disk."""
        self._plays.forget()
        self.selfplay.restore(state)

    async def _play(self, step: int) -> Played:
        # One that broke off and begins again counts from its first beginning.
        began, before = self._beginnings.setdefault(step, (time.monotonic(), self.engine.stats()))
        self._journal, self._before = Journal(self.run, step), before
        if self.run.recorded_steps[-1:] == [step]:  # later ones were played by what this step has trained
            self._journal.forget(UNJUDGED)  # a judge who was down may answer by now
        self._kept = self._asked = self._rollouts = 0
        try:
            play = await self.selfplay.play(step, finished=self._journal.read())
        finally:
            self._journal.close()
        del self._beginnings[step]
        seconds = time.monotonic() - began
        visits = {f"visits/{domain}": times for domain, times in self._clusters.visits.items()}
        metrics = {"time/rollout": seconds, **visits, **_token_metrics(before, self.engine.stats())}
        return Played(play, self.selfplay.state(), metrics)

    def measure(self, step: int) -> dict[str, float]:
        """Scores of the present weights, those after `step`: on held-out questions, and on benchmarks.

        Where the run is asked to stop first it says that it owes them: what was answered is journaled, and a resumed
        run begins with the rest.
        """
        with self.phase("measure"):
            scores = self._plays.run(self._stop.race(self._measure(step)))
        self.owes = scores is None
        return {_OWED: 1.0} if scores is None else scores

    async def _measure(self, step: int) -> dict[str, float]:
        scores = await self._accuracy() if self._questions else {}
        if self._benchmarks:
            folder = self.run.path / "eval" / f"step-{step:05d}"
            scores |= await self._benchmarks(self.engine, self.codec, folder)
        return scores

    async def _accuracy(self) -> dict[str, float]:
        score = await accuracy(
            self.engine,
            self.codec,
            self.prompts,
            self._questions,
            samples=self.settings.heldout.samples,
            sampling=self.settings.selfplay.sampling,
            seed=self.settings.heldout.seed,
            max_model_len=self.settings.rollout.max_model_len,
        )
        by_task = {f"heldout/{task}": value for task, value in score.by_task.items()}
        by_label = {f"heldout_by/{label}": value for label, value in score.by_label.items()}
        best = {f"heldout_best/{name}": value for name, value in score.best.items()}
        return {_MEAN: score.mean, **by_task, **by_label, **best}

    def record_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """What was measured of the weights that the run goes on from: the row of step 0, or the rest of another one."""
        [row] = [row for row in read_metrics(self.run) if row["step"] == step] or [{}]
        dropped = ("step", "time", _OWED)
        kept = {name: value for name, value in row.items() if name not in dropped and value is not None}
        self.metrics.log(step, {**kept, **scores})
        self.owes = _OWED in scores
        if _MEAN in scores:
            when = f"after step {step}" if step else "before training"
            self.live.note(f"held-out {when}: {scores[_MEAN]:.3f}")

    def record(
        self,
        step: int,
        played: Played | None,
        dropped: Collection[int],
        update: Update | None,
        scores: Mapping[str, float],
    ) -> float:
        """Write the step's metrics; `dropped` groups of its batch were left out of the update, None was skipped.

        Returns the mean gap between engine and learner on tokens of the weights that were trained; 0 where there are
        too few.
        """
        assert played is not None, "rank 0 has played"
        with self.phase("record"):
            batch = played.play.batch.without(dropped)
            learned = self._learned(step, batch, update) if update else {}
            values = {
                **step_metrics(played.play),
                "mismatch/dropped": len(dropped),
                "policy/skipped": float(update is None),
                **staleness(batch.train, step - 1),
                **learned,
                **played.metrics,
                **{f"time/{phase}": seconds for phase, seconds in self._seconds.items()},
                **scores,
            }
            self._seconds.clear()  # what this phase takes shows in the next row
            self.metrics.log(step, values)
            self._archive.after(step)
        self.live.done(step, values)
        return learned.get("mismatch/newest", 0.0)

    def _learned(self, step: int, batch: Batch, update: Update) -> dict[str, float]:
        """What an update says of its batch and of itself."""
        return {
            **mismatch(batch.train, update.scores, batch.roles, step - 1),
            **importance(batch.train, update.scores, self.settings.policy.loss.importance_cap),
            "policy/loss": update.loss,
            "policy/grad_norm": update.grad_norm,
            "policy/lr": update.lr,
            **{f"policy/{name}": value for name, value in update.said.items()},
            **update.router_metrics(),
            **update.scores.mean_entropy(batch.roles),
            "tokens/trained": update.tokens,
        }

    def reward(self, played: Played) -> float | None:
        """The responder's mean reward in a step; None where nobody answered."""
        return step_metrics(played.play).get("responder/reward")

    def set_aside(self, step: int) -> None:
        """Keep a step's episodes out of the way: a resumed run asks its questions anew."""
        path = self.run.rollouts(step)
        with writing(path):
            path.rename(path.with_name(path.name + ".bad"))

    def report(self) -> None:
        write_report(self.run.path)

    def state(self) -> dict[str, Any]:
        """Where self-play is."""
        return self.selfplay.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.selfplay.restore(state)

    def say(self, doing: str) -> None:
        """Show what goes on outside the steps."""
        self.live.phase(doing)

    def note(self, text: str) -> None:
        self.live.note(text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show and time a part of the step."""
        self.live.phase(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - began  # type: ignore[assignment]

    def _on_episode(self, episode: Episode) -> None:
        self._journal.append(episode)
        self._kept += episode.kept
        self._asked += 1
        self._rollouts += sum(1 for _ in episode.rollouts())
        self.live.progress(
            kept=self._kept,
            asked=self._asked,
            rollouts=self._rollouts,
            tokens=self.engine.stats().generated_tokens - self._before.generated_tokens,
        )

    metrics: Metrics
    owes: bool
    """Whether the present weights have yet to be measured: a stop broke that off, or they are the last ones by now."""
    _archive: Archive
    _before: EngineStats
    _journal: Journal
    _kept: int
    _asked: int
    _rollouts: int


def _keeping(settings: config.Config, run: RunFolder) -> Callable[[str], Keeping] | None:
    """Who keeps the servers of other nodes, where the launcher does."""
    return partial(Keeping, run.path, attempt()) if run.are_kept(settings.rollout.servers) else None


def _warn_of_rare_visits(settings: config.Config, clusters: ClusterSampler) -> None:
    """A curriculum by memory needs pairs of cluster and task that come again (the paper meets each 5 to 8 times)."""
    visits = clusters.expected_visits(settings.steps * settings.selfplay.round_questions)
    for domain, times in visits.items():
        if settings.selfplay.memory and times < 1:
            _log.warning(
                "corpus %s: in %d steps each of its %s clusters is met with each task about %.2g times, so the"
                " history memory will hardly act: cap the source (`clusters` of its corpus.sources entry), or"
                " raise steps",
                domain,
                settings.steps,
                f"{clusters.domains[domain]:,}",
                times,
            )


def _token_metrics(before: EngineStats, now: EngineStats) -> dict[str, float]:
    """What the engine did between the two; the work of a play that was under way meanwhile is in it."""
    prompts = now.prompt_tokens - before.prompt_tokens
    return {
        "tokens/generated": now.generated_tokens - before.generated_tokens,
        "tokens/prompt": prompts,
        "tokens/prefix_hits": (now.cached_tokens - before.cached_tokens) / max(prompts, 1),
    }
