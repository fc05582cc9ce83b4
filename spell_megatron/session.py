"""The parts of a run, built in the order that they need each other and taken down in reverse.

One process holds a learner and an in-process engine; under torchrun every rank holds its part of the
learner, and rank 0 alone the engine, self-play and the records.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch.distributed as dist

from spell_megatron.checkpoint import Checkpoint, Checkpoints, load_learner
from spell_megatron.config import Config, dump_config
from spell_megatron.corpus import ClusterSampler
from spell_megatron.corpus.heldout import load_heldout
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.learner import Learner, Update
from spell_megatron.policy.mismatch import mismatch
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.record import Console, Journal, Live, Metrics, RunFolder, logging_to, write_report
from spell_megatron.rollout.engine import EngineStats
from spell_megatron.rollout.inprocess import InProcessEngine
from spell_megatron.selfplay import Episode, HeldOutScore, Play, Prompts, SelfPlay, accuracy, step_metrics
from spell_megatron.types import SpellError, TrainBatch
from spell_megatron.weights.locate import model_folder
from tokenizer.chat import ChatTokenizer


class MismatchError(SpellError):
    """Engine and learner have drifted apart beyond `record.mismatch_bound`."""


class Session:
    """What the training loop works with. Use `open_session`."""

    def __init__(self, config: Config, run: RunFolder, stack: ExitStack) -> None:
        self.config, self.run, self._stack = config, run, stack
        console = stack.enter_context(Console(config.steps))
        stack.enter_context(logging_to(run, console.terminal))
        self.live: Live = console
        self._seconds: Counter[str] = Counter()
        model = model_folder(config.model.path)
        self.live.note(f"model {model}, run folder {run.path}")
        self.codec = ChatTokenizer.load(model, config.model.thinking)
        clusters = ClusterSampler(config.corpus, self.codec.count, config.seed, run.corpus)
        self.world = start_world(
            config.policy.layout, seed=config.seed, timeout_seconds=config.policy.timeout_seconds
        )
        stack.callback(stop_world)
        sampling = config.selfplay.sampling
        self.learner = Learner(
            config.policy, model, self.world, sampled=Sampled(sampling.temperature, sampling.top_p)
        )
        self.engine = InProcessEngine(
            model, config.rollout, scratch=run.path / "engine", stop=self.codec.eos_ids, seed=config.seed
        )
        stack.callback(self.engine.close)
        self.prompts = Prompts(config.model.prompts)
        self.selfplay = SelfPlay(
            config.selfplay,
            prompts=self.prompts,
            codec=self.codec,
            generator=self.engine,
            clusters=clusters,
            seed=config.seed,
            max_model_len=config.rollout.max_model_len,
            on_episode=self._on_episode,
        )
        self._questions = load_heldout(config.heldout)
        self._checkpoints = Checkpoints(run.checkpoints, config.record.keep_last)
        self.step = self._resume()
        self.metrics = Metrics(run, config.record.wandb, after=self.step)
        stack.callback(self.metrics.close)

    async def play(self, step: int) -> Play:
        """One step of self-play; its finished episodes are on disk before it returns."""
        self.live.begin(step, self.config.selfplay.questions)
        self._journal = Journal(self.run, step)
        self._step_episodes: list[Episode] = []
        self._before = self.engine.stats()
        try:
            with self._phase("play"):
                play = await self.selfplay.play(step, finished=self._journal.read())
        finally:
            self._journal.sync()
            self._journal.close()
        return play

    def share(self, play: Play) -> TrainBatch:
        """The step's batch, on every rank."""
        if self.world.size == 1:
            return play.batch.train
        box = [play.batch.train]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def update(self, batch: TrainBatch) -> Update:
        with self._phase("update"):
            return self.learner.update(batch)

    def resync(self, step: int) -> None:
        """Give the engine the weights of the update that `step` made."""
        with self._phase("resync"):
            self.engine.update_weights(self.learner.weights(), version=step)

    async def measure(self, step: int, *, force: bool = False) -> HeldOutScore | None:
        """Held-out accuracy of the present weights, where it is due."""
        due = self.config.heldout.every and step % self.config.heldout.every == 0
        if not self._questions or not (force or due):
            return None
        with self._phase("measure"):
            return await accuracy(
                self.engine,
                self.codec,
                self.prompts,
                self._questions,
                samples=self.config.heldout.samples,
                sampling=self.config.selfplay.sampling,
                seed=self.config.heldout.seed,
                max_model_len=self.config.rollout.max_model_len,
            )

    def start(self, score: HeldOutScore | None) -> None:
        """Record what was measured before the first step."""
        self.metrics.log(0, _score_metrics(score))
        if score is not None:
            self.live.note(f"held-out before training: {score.mean:.3f}")

    def record(self, step: int, play: Play, update: Update, score: HeldOutScore | None) -> None:
        """Write the step's metrics, commit a checkpoint where one is due, and stop a run that has drifted."""
        with self._phase("record"):
            gap = mismatch(play.batch.train, update.scores, play.batch.roles)
            values = {
                **step_metrics(play),
                **gap,
                "policy/loss": update.loss,
                "policy/grad_norm": update.grad_norm,
                "policy/lr": update.lr,
                "policy/clipped": update.clipped,
                "policy/entropy": update.scores.mean_entropy,
                **self._token_metrics(update),
                **{f"time/{phase}": seconds for phase, seconds in self._seconds.items()},
                **_score_metrics(score),
            }
            self._seconds.clear()  # what this phase takes shows in the next row
            # First the row, then the checkpoint: a resumed run forgets rows beyond its checkpoint, but could
            # not make up for one that is missing.
            self.metrics.log(step, values)
            self.step = step
            drifted = gap.get("mismatch/mean", 0.0) > self.config.record.mismatch_bound
            every = self.config.record.checkpoint_every
            if drifted or (every and step % every == 0):
                self.commit(step)
        self.live.done(step, values)
        if drifted:
            raise MismatchError(
                f"step {step}: log-probs of engine and learner differ by {gap['mismatch/mean']:.3f}"
                f" on average, beyond record.mismatch_bound={self.config.record.mismatch_bound}; the state is saved."
                " Compare the two with `spell-megatron parity`, or raise the bound"
            )

    def commit(self, step: int) -> None:
        self._checkpoints.save(step, self.learner, {"selfplay": self.selfplay.state()})

    def finish(self) -> None:
        """The exported model, the last checkpoint and the report."""
        if self._checkpoints.newest_step() != self.step:
            self.commit(self.step)
        self.learner.save_hf(self.run.hf)
        write_report(self.run.path)

    def save_starved(self) -> None:
        """Keep the state of a run whose last step could not fill its batch, and show what it did."""
        self.commit(self.step)
        write_report(self.run.path)

    def _resume(self) -> int:
        """Take over the newest whole checkpoint; the step that it was made after, 0 where there is none."""
        found: Checkpoint | None = self._checkpoints.newest()
        if found is None:
            return 0
        load_learner(self.learner, found)
        self.selfplay.restore(found.run["selfplay"])
        self.engine.update_weights(self.learner.weights(), version=found.step)
        self.live.note(f"resumed after step {found.step} from {found.path}")
        return found.step

    def _on_episode(self, episode: Episode) -> None:
        self._journal.append(episode)
        self._step_episodes.append(episode)
        self.live.progress(
            kept=sum(e.kept for e in self._step_episodes),
            asked=len(self._step_episodes),
            rollouts=sum(1 for e in self._step_episodes for _ in e.rollouts()),
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

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.live.phase(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - began  # type: ignore[assignment]

    _before: EngineStats
    _journal: Journal
    _step_episodes: list[Episode]


@contextmanager
def open_session(config: Config, run: RunFolder) -> Iterator[Session]:
    """Build a session in a run folder, resuming from its newest checkpoint if it has one."""
    with ExitStack() as stack:
        run.save_config(dump_config(config))
        yield Session(config, run, stack)


def _score_metrics(score: HeldOutScore | None) -> Mapping[str, float]:
    if score is None:
        return {}
    return {"heldout/mean": score.mean, **{f"heldout/{task}": value for task, value in score.by_task.items()}}
