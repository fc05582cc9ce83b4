"""What rank 0 alone does: engine, self-play, measurements, records. The other ranks hold a part of the learner.

Its parts are built in the order that they need each other and taken down in reverse.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spell_megatron import config
from spell_megatron.corpus import ClusterSampler, StaticQuestions, load_heldout
from spell_megatron.policy.learner import Update
from spell_megatron.policy.mismatch import mismatch
from spell_megatron.record import Console, Journal, Live, Metrics, RunFolder, logging_to, write_report
from spell_megatron.rollout.engine import Engine, EngineStats
from spell_megatron.rollout.fleet import Fleet
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.selfplay import Episode, HeldOutScore, Play, Prompts, SelfPlay, accuracy, step_metrics
from tokenizer.chat import ChatTokenizer


class Driver:
    """Plays, measures and records one run in its folder. A context manager through `stack`."""

    def __init__(
        self, settings: config.Config, run: RunFolder, model: Path, stack: ExitStack, *, alone: bool
    ) -> None:
        self.settings, self.run = settings, run
        console = stack.enter_context(Console(settings.steps))
        stack.enter_context(logging_to(run, console.terminal))
        self.live: Live = console
        self.live.note(f"model {model}, run folder {run.path}")
        self._seconds: Counter[str] = Counter()
        self.codec = ChatTokenizer.load(model, settings.model.thinking)
        self.prompts = Prompts(settings.model.prompts)
        self._questions = load_heldout(settings.heldout)
        clusters = ClusterSampler(settings.corpus, self.codec.count, settings.seed, run.corpus)
        self.engine = _engine(settings, run, model, self.codec.eos_ids, alone)
        stack.callback(self.engine.close)
        self.selfplay = SelfPlay(
            settings.selfplay,
            prompts=self.prompts,
            codec=self.codec,
            generator=self.engine,
            clusters=StaticQuestions(clusters) if settings.selfplay.static_questions else clusters,
            seed=settings.seed,
            max_model_len=settings.rollout.max_model_len,
            on_episode=self._on_episode,
        )
        self._stack = stack

    def begin(self, step: int) -> None:
        """Start the records after `step`, forgetting rows of steps that will be made again."""
        self.metrics = Metrics(self.run, self.settings.record.wandb, after=step)
        self._stack.callback(self.metrics.close)
        if step:
            self.live.note(f"resumed after step {step}")

    async def play(self, step: int) -> Play:
        """One step of self-play; its finished episodes are on disk, whatever ends it."""
        self.live.begin(step, self.settings.selfplay.questions)
        self._journal = Journal(self.run, step)
        self._kept = self._asked = self._rollouts = 0
        self._before = self.engine.stats()
        try:
            with self.phase("play"):
                return await self.selfplay.play(step, finished=self._journal.read())
        finally:
            self._journal.close()

    def resync(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        self.engine.update_weights(weights, version=step)

    async def measure(self) -> HeldOutScore | None:
        """Held-out accuracy of the present weights; None where there are no held-out questions."""
        if not self._questions:
            return None
        with self.phase("measure"):
            return await accuracy(
                self.engine,
                self.codec,
                self.prompts,
                self._questions,
                samples=self.settings.heldout.samples,
                sampling=self.settings.selfplay.sampling,
                seed=self.settings.heldout.seed,
                max_model_len=self.settings.rollout.max_model_len,
            )

    def record_start(self, score: HeldOutScore | None) -> None:
        """The row of step 0: what was measured before training."""
        self.metrics.log(0, _score_metrics(score))
        if score is not None:
            self.live.note(f"held-out before training: {score.mean:.3f}")

    def record(self, step: int, play: Play, update: Update, score: HeldOutScore | None) -> float:
        """Write the step's metrics. Returns the mean gap of engine and learner log-probs."""
        with self.phase("record"):
            gap = mismatch(play.batch.train, update.scores, play.batch.roles)
            values = {
                **step_metrics(play),
                **gap,
                "policy/loss": update.loss,
                "policy/grad_norm": update.grad_norm,
                "policy/lr": update.lr,
                "policy/clipped": update.clipped,
                **update.scores.mean_entropy(play.batch.roles),
                **self._token_metrics(update),
                **{f"time/{phase}": seconds for phase, seconds in self._seconds.items()},
                **_score_metrics(score),
            }
            self._seconds.clear()  # what this phase takes shows in the next row
            self.metrics.log(step, values)
        self.live.done(step, values)
        return gap.get("mismatch/mean", 0.0)

    def report(self) -> None:
        write_report(self.run.path)

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

    def _token_metrics(self, update: Update) -> dict[str, float]:
        now, before = self.engine.stats(), self._before
        prompts = now.prompt_tokens - before.prompt_tokens
        return {
            "tokens/generated": now.generated_tokens - before.generated_tokens,
            "tokens/prompt": prompts,
            "tokens/prefix_hits": (now.cached_tokens - before.cached_tokens) / max(prompts, 1),
            "tokens/trained": update.tokens,
        }

    metrics: Metrics
    _before: EngineStats
    _journal: Journal
    _kept: int
    _asked: int
    _rollouts: int


def _engine(
    settings: config.Config, run: RunFolder, model: Path, stop: tuple[int, ...], alone: bool
) -> Engine:
    """In this process if it is the only one and no servers are configured; else a fleet, of one at least.

    An engine inside one rank of many would wait for the others: vLLM makes its groups over the whole world.
    """
    rollout = settings.rollout
    scratch = run.path.parent / ".engine"  # vLLM caches there what it learns of a model; runs share it
    common: dict[str, Any] = {"scratch": scratch, "stop": stop}
    wanted = bool(rollout.servers.count or rollout.servers.urls)
    if alone and not wanted:
        return InProcessEngine(model, rollout, seed=settings.seed, **common)
    if not wanted:
        rollout = replace(rollout, servers=replace(rollout.servers, count=1))
    return Fleet(model, rollout, logs=run.path / "engines", **common)


def _score_metrics(score: HeldOutScore | None) -> dict[str, float]:
    if score is None:
        return {}
    return {"heldout/mean": score.mean, **{f"heldout/{task}": value for task, value in score.by_task.items()}}
