"""A run on every rank: the learner and its checkpoints, in step with what rank 0 plays and records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from spell_megatron.checkpoint import Checkpoints
from spell_megatron.config import Config, dump_config, load_config
from spell_megatron.driver import Driver, Measurement, Played
from spell_megatron.outputs import make_room
from spell_megatron.placement import Phase, Placement
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.learner import Learner, Update
from spell_megatron.policy.mismatch import groups_beyond
from spell_megatron.policy.residence import LearnerResidence
from spell_megatron.policy.world import Value, World, agreed, start_world, stop_world
from spell_megatron.preemption import Preempted, Stop, listen, preempted
from spell_megatron.record import RunFolder, RunLock, forget_episodes, locked, private, same_episodes
from spell_megatron.rollout import backend
from spell_megatron.rollout.residence import EngineResidence
from spell_megatron.types import SpellError, TrainBatch
from spell_megatron.weights.locate import model_folder

Benchmarks = Callable[[Config], Measurement | None]


class MismatchError(SpellError):
    """Engine and learner have drifted apart beyond `record.mismatch_bound`."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """What rank 0 tells the others of a step: its batch, or why there is none."""

    batch: TrainBatch | None = None
    fault: str = ""
    """Why the step could not be played."""


class Session:
    """What the training loop works with. `driver` is rank 0's part, None elsewhere. Use `open_session`."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        world: World,
        stack: ExitStack,
        benchmarks: Measurement | None = None,
        *,
        origin: int | None = None,
        lock: RunLock | None = None,
    ) -> None:
        self.config, self.run, self.world = config, run, world
        self._stop: Stop = listen()
        sampling = config.selfplay.sampling
        model = model_folder(config.model.path)
        self.learner = Learner(
            config.policy, model, world, sampled=Sampled(sampling.temperature, sampling.top_p)
        )
        colocated = backend.colocated(config)
        self._placement = Placement(dist.barrier)
        if colocated:
            self._placement.admit(LearnerResidence(self.learner))
        self._placement.enter(Phase.BUILD)
        self.driver = (
            Driver(config, run, model, stack, alone=world.size == 1, stop=self._stop, benchmarks=benchmarks)
            if world.is_main
            else None
        )
        if colocated and self.driver:
            self._placement.admit(EngineResidence(self.driver.engine))
        record = config.record
        self._checkpoints = Checkpoints(
            run.checkpoints,
            record.keep_last,
            keep_every=record.keep_every,
            background=record.async_save,
            lost=lock.lost if lock else str,
        )
        stack.callback(self._checkpoints.close)
        self._played: Played | None = None
        self._dropped: frozenset[int] = frozenset()
        self.step = self._resume(origin)
        self._state = self.driver.selfplay.state() if self.driver else {}
        if self.driver:
            self.driver.begin(self.step)

    def play(self, step: int) -> TrainBatch:
        """The step's batch, on every rank. Where there is none, the state is saved and the reason raised."""
        self._placement.enter(Phase.GENERATE)
        turn = _Turn()
        if self.driver:
            try:
                self._played = self.driver.play(step)
                turn = _Turn(self._played.play.batch.train if self._played else None)
            except SpellError as error:
                turn = _Turn(fault=str(error))
        turn = self._shared(turn)
        if turn.batch is not None:
            return turn.batch
        self._save()
        if self.driver:
            self.driver.report()
        if turn.fault:
            raise SpellError(turn.fault)
        leaving = (
            preempted(self.run.path, self.step, self._stop) if self.driver else Preempted("asked to stop")
        )
        dist.barrier()  # no rank leaves before the run is marked as saved
        raise leaving

    def update(self, batch: TrainBatch) -> Update:
        """One update, of the groups that are within `record.mismatch_bound` where others are to be dropped."""
        self._placement.enter(Phase.TRAIN)
        with self._phase("update"):
            if self.config.record.mismatch_action == "drop":
                batch = self._within_bound(batch)
            return self.learner.update(batch)

    def _within_bound(self, batch: TrainBatch) -> TrainBatch:
        """The groups on which engine and learner agree. Costs a forward pass over the batch."""
        scores, bound = self.learner.score(batch), self.config.record.mismatch_bound
        self._dropped = self._shared(groups_beyond(batch, scores, bound) if self.driver else frozenset())
        if len(self._dropped) == len(batch.groups):
            self._save()
            raise self._mismatch(self.step + 1, f"by more than {bound} in every group of the batch")
        return batch.without(self._dropped)

    def resync(self, step: int) -> None:
        """Give the engine the weights that `step` made. The stream is a collective: every rank drains it."""
        self._placement.enter(Phase.RESYNC)
        with self._phase("resync"):
            if self.driver:
                self.driver.resync(self.learner.weights(), step)
            else:
                for _ in self.learner.weights():
                    pass

    def measure(self, step: int) -> dict[str, float]:
        """Scores by name, where they are due: before the first step, every so many, and after the last."""
        every = self.config.heldout.every
        due = step in (0, self.config.steps) or (every and step % every == 0)
        if due:
            self._placement.enter(Phase.GENERATE)
        return self.driver.measure(step) if self.driver and due else {}

    def record(self, step: int, update: Update, scores: Mapping[str, float]) -> None:
        """Write the step's row, then its checkpoint if one is due: a resumed run forgets rows beyond its
        checkpoint, but could not make up for one that is missing."""
        gap = 0.0
        if self.driver and self._played:
            gap = self.driver.record(step, self._played, self._dropped, update, scores)
            self._state = self._played.state
        self.step, gap = step, self._shared(gap)
        drifted, every = gap > self.config.record.mismatch_bound, self.config.record.checkpoint_every
        if drifted or (every and step % every == 0):
            self.commit(step)
        if drifted:
            self._save()
            raise self._mismatch(step, f"by {gap:.3f} on average")

    def _mismatch(self, step: int, how: str) -> MismatchError:
        return MismatchError(
            f"step {step}: log-probs of engine and learner differ {how}, beyond"
            f" record.mismatch_bound={self.config.record.mismatch_bound}; the state is saved. Compare the two"
            " with `spell-megatron parity`, or raise the bound"
        )

    def commit(self, step: int) -> None:
        """Save the state after `step`, on every rank; with `record.async_save` it is on its way to the disk."""
        self._placement.enter(Phase.TRAIN)
        with self._phase("record"):
            self._checkpoints.save(step, self.learner, {"selfplay": self._state})

    def _save(self) -> None:
        """The state after the last step is on disk when this returns."""
        if self._checkpoints.saved != self.step:
            self.commit(self.step)
        self._checkpoints.wait()

    def finish(self) -> None:
        """The last checkpoint, the exported model and the report."""
        self._save()
        self._placement.enter(Phase.TRAIN)
        if self.driver:
            make_room(self.run.hf, "model")
        self.learner.save_hf(self.run.hf)
        if self.driver:
            self.driver.report()

    def _resume(self, origin: int | None) -> int:
        """Take over the newest whole checkpoint, or that of a step; the step, 0 at the very beginning."""
        self._placement.enter(Phase.TRAIN)
        found = self._checkpoints.restore(self.learner, origin)
        if found is not None and self.driver:
            self.driver.selfplay.restore(found.run["selfplay"])
        step = found.step if found else 0
        if step or self.config.rollout.servers.urls:
            self.resync(step)
        return step

    def _shared(self, value: Value) -> Value:
        return share(value, self.world)

    def _phase(self, name: str) -> Any:
        return self.driver.phase(name) if self.driver else nullcontext()


@contextmanager
def open_session(
    config: Config, run: Path | None, benchmarks: Benchmarks | None = None, *, origin: int | None = None
) -> Iterator[Session]:
    """A session in the run folder `run`, resumed from its newest checkpoint; in a new folder where None.

    `origin` is another step to go on from, 0 the very beginning; what is later is set aside.
    `benchmarks` makes what measures `heldout.benchmarks` (`eval.live_benchmarks`; this room does not know it).
    """
    if config.heldout.benchmarks and benchmarks is None:
        raise SpellError("heldout.benchmarks: pass eval.live_benchmarks, or train by the command line")
    world = start_world(config.policy.layout, seed=config.seed, timeout_seconds=config.policy.timeout_seconds)
    with ExitStack() as stack:
        stack.callback(stop_world)
        stack.enter_context(private(config.record.group_readable))
        before = read_run_config(run) if run else config
        if run is None:
            made = RunFolder.create(config.runs, config.name).path if world.is_main else None
            run = share(made, world)
        assert run is not None
        folder = RunFolder(run)
        lock = _locked(folder, world, stack)
        if world.is_main:
            folder.close_to_others(config.record.group_readable)
            folder.save_config(dump_config(before))
        measurement = benchmarks(config) if benchmarks and world.is_main else None
        session = Session(config, folder, world, stack, measurement, origin=origin, lock=lock)
        if world.is_main:
            if origin is not None or not same_episodes(before, config):
                forget_episodes(folder, after=session.step)
            folder.save_config(
                dump_config(config)
            )  # now that no episode of the one before is left to go on with
        yield session


def _locked(folder: RunFolder, world: World, stack: ExitStack) -> RunLock | None:
    """Rank 0's lock of the run folder. Raises SpellError, on every rank, where it cannot be had."""
    lock: RunLock | None = None
    fault: SpellError | None = None
    if world.is_main:
        try:
            lock = stack.enter_context(locked(folder.path))
        except SpellError as error:
            fault = error
    if (fault := share(fault, world)) is not None:
        raise fault
    return lock


def read_run_config(run: Path, overrides: tuple[str, ...] = ()) -> Config:
    """The configuration of an existing run."""
    return load_config(str(RunFolder.open(run).config), overrides)


def share(value: Value, world: World) -> Value:
    """Rank 0's value, on every rank."""
    return agreed(value, dist.group.WORLD if world.size > 1 else None)
