"""A run on every rank: the learner and its checkpoints, in step with what rank 0 plays and records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from spell_megatron.checkpoint import Checkpoints
from spell_megatron.config import Config, dump_config, load_config
from spell_megatron.driver import Driver, Measurement, Played
from spell_megatron.outputs import make_room
from spell_megatron.placement import Phase, Placement
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.learner import Learner, Scores, Update
from spell_megatron.policy.mismatch import groups_beyond
from spell_megatron.policy.residence import LearnerResidence
from spell_megatron.policy.soundness import UnsoundError, entropy_beyond
from spell_megatron.policy.waiting import MainRank
from spell_megatron.policy.world import Value, World, agreed, start_world, stop_world
from spell_megatron.preemption import Preempted, Stop, attempt, listen, preempted
from spell_megatron.record import RunFolder, RunLock, forget_episodes, locked, private, same_episodes, working
from spell_megatron.rollout import backend
from spell_megatron.rollout.address import read_secret
from spell_megatron.rollout.engine import Engine, WeightsWanted
from spell_megatron.rollout.experts import check_replay
from spell_megatron.rollout.follower import Follower
from spell_megatron.rollout.residence import EngineResidence
from spell_megatron.selfplay import prompts_of
from spell_megatron.selfplay.ports import Judge
from spell_megatron.types import SpellError, TrainBatch
from spell_megatron.weights.locate import model_folder

Benchmarks = Callable[[Config], Measurement | None]
Judges = Callable[[Config], Judge | None]


_SKIPS = 3
"""Bad steps in a row after which a run ends, whatever `record.bad_step` says."""


class BadStepError(SpellError):
    """A step whose update was not made, or not kept."""


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
        main: MainRank,
        stack: ExitStack,
        benchmarks: Benchmarks | None = None,
        judges: Judges | None = None,
        *,
        origin: int | None = None,
        lock: RunLock | None = None,
    ) -> None:
        self.config, self.run, self.world, self._main = config, run, world, main
        self._stop: Stop = listen()
        sampling = config.selfplay.sampling
        model = model_folder(config.model.path)
        with working("loading the model") if world.is_main else nullcontext():
            self.learner = Learner(
                config.policy, model, world, sampled=Sampled(sampling.temperature, sampling.top_p)
            )
        self._found = backend.here(config, ranks_of_a_node(world, config))
        self._placement = Placement(self._together)
        if self._found.colocated:
            self._placement.admit(LearnerResidence(self.learner))
        self._placement.enter(Phase.BUILD)
        self.driver: Driver | None = None
        main.work(
            "reads the corpus and starts the engines", lambda: self._drive(model, stack, benchmarks, judges)
        )
        self._engine: Engine | Follower
        if self.driver:
            self._engine = self.driver.engine
        else:
            self._engine = Follower(model, self._found.transfer, scratch=run.engine_cache)
            stack.callback(self._engine.close)
        if self._found.colocated and self.driver:
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
        self._skipped = 0
        self.step = self._resume(origin)
        self._state: dict[str, Any] = self.driver.selfplay.state() if self.driver else {}
        if self.driver:
            self.driver.begin(self.step)

    def _drive(
        self, model: Path, stack: ExitStack, benchmarks: Benchmarks | None, judges: Judges | None
    ) -> None:
        """Build rank 0's part. No rank has device memory, so servers on other nodes may start, too."""
        if self._found.colocated and self.config.rollout.servers.urls:
            self.run.vacated(attempt()).touch()
        measurement = benchmarks(self.config) if benchmarks else None
        self.driver = Driver(
            *(self.config, self.run, model, stack, self._found),
            stop=self._stop,
            benchmarks=measurement,
            judge=judges(self.config) if judges else None,
        )

    def play(self, step: int) -> TrainBatch:
        """The step's batch, on every rank. Where there is none, the state is saved and the reason raised."""
        turn = self._with_engines(f"plays step {step}", lambda driver: self._turn(driver, step), step - 1)
        if turn.batch is not None:
            return turn.batch
        self._save()
        self._report()
        if turn.fault:
            raise SpellError(turn.fault)
        leaving = (
            preempted(self.run.path, self.step, self._stop) if self.driver else Preempted("asked to stop")
        )
        dist.barrier()  # no rank leaves before the run is marked as saved
        raise leaving

    def _turn(self, driver: Driver, step: int) -> _Turn:
        try:
            self._played = driver.play(step)
        except WeightsWanted:
            driver.rewind(self._state)
            raise
        except SpellError as error:
            return _Turn(fault=str(error))
        return _Turn(self._played.play.batch.train if self._played else None)

    def _with_engines(self, doing: str, work: Callable[[Driver], Value], step: int) -> Value:
        """What rank 0 does with engines that hold the weights of `step`; its result, on every rank.

        Of weights that go from every rank to its own device no copy is kept: where all engines ended and came
        back, they are sent again, and the work is done again.
        """
        while True:
            self._placement.enter(Phase.GENERATE)
            value, done = self._main.work(doing, lambda: self._once(work))
            if done:
                return cast("Value", value)
            self.resync(step)

    def _once(self, work: Callable[[Driver], Value]) -> tuple[Value | None, bool]:
        """Its result and True, or False where the engines have to be given the weights again."""
        assert self.driver is not None, "work is rank 0's"
        try:
            return work(self.driver), True
        except WeightsWanted as wanted:
            self.driver.live.note(str(wanted))
            return None, False

    def update(self, batch: TrainBatch) -> Update | None:
        """One update, of the groups that are within `record.mismatch_bound` where others are to be dropped.

        None where it must not be made and `record.bad_step` says to go on.
        """
        self._placement.enter(Phase.UPDATE)
        with self._phase("update"):
            try:
                self._check_reward()
                if self.config.record.mismatch_action == "drop":
                    batch = self._within_bound(batch)
                update = self.learner.update(batch, self._judge)
            except UnsoundError as fault:
                self._bad(fault)
                return None
        self._skipped = 0
        return update

    def _check_reward(self) -> None:
        """Raise UnsoundError, on every rank, where the step's play has no reward worth learning from."""
        low = self.config.record.reward_min
        if low is not None and (mean := self._shared(self._reward())) is not None and not mean >= low:
            raise UnsoundError(f"the responder's mean reward is {mean:.3g}, below record.reward_min={low:g}")

    def _reward(self) -> float | None:
        return self.driver.reward(self._played) if self.driver and self._played else None

    def _judge(self, scores: Scores) -> UnsoundError | None:
        record = self.config.record
        return entropy_beyond(scores.entropy, record.entropy_min, record.entropy_max)

    def _bad(self, fault: UnsoundError) -> None:
        """Go on to the next step or raise: with the state of before on disk, unless the weights are touched."""
        self._skipped += 1
        step = self.step + 1
        where = "" if fault.group is None else f" in group {fault.group}{self._described(fault.group)}"
        what = f"step {step}: {fault}{where}"
        if self.config.record.bad_step == "skip" and self._skipped < _SKIPS and not fault.touched:
            if self.driver:
                self.driver.live.note(f"{what}; the step is skipped")
            return
        if fault.touched:
            kept = "its weights are not saved; `resume` goes on from the last checkpoint"
        else:
            self._save()
            if fault.group is not None and self.driver:
                self.driver.set_aside(step)  # or every resume would read it again
            kept = f"nothing was updated, and the state after step {self.step} is saved; `resume` goes on from it"
        self._checkpoints.wait()
        raise BadStepError(
            f"{what}; {kept}. Look at the rollouts and metrics of the steps before; a smaller"
            " policy.optimizer.lr, or record.bad_step=skip, may help"
        ) from None

    def _described(self, group: int) -> str:
        """The group's role and task, known to rank 0."""
        if self._played is None:
            return ""
        batch = self._played.play.batch.without(self._dropped)
        return f" ({batch.roles[group]}, {batch.tasks[group]})"

    def _within_bound(self, batch: TrainBatch) -> TrainBatch:
        """The groups on which engine and learner agree. Costs a forward pass over the batch."""
        self.learner.check()
        scores, bound = self.learner.score(batch), self.config.record.mismatch_bound
        self._dropped = self._shared(groups_beyond(batch, scores, bound) if self.driver else frozenset())
        if len(self._dropped) == len(batch.groups):
            self._save()
            raise self._mismatch(self.step + 1, f"by more than {bound} in every group of the batch")
        return batch.without(self._dropped)

    def resync(self, step: int) -> None:
        """Give the engine the weights that `step` made. A collective: every rank takes its part in it."""
        self._placement.enter(Phase.RESYNC)
        with self._phase("resync"):
            self._engine.update_weights(self._at_once(self.learner.weights()), step)

    def _at_once(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A stream that begins on every rank when rank 0 begins it: engines may have to finish requests before."""
        self._main.meet()
        yield from stream

    def measure(self, step: int) -> dict[str, float]:
        """Scores by name, where they are due: before the first step, every so many, and after the last."""
        every = self.config.heldout.every
        due = step in (0, self.config.steps) or (every and step % every == 0)
        doing = f"measures after step {step}"
        return self._with_engines(doing, lambda driver: driver.measure(step), step) if due else {}

    def record(self, step: int, update: Update | None, scores: Mapping[str, float]) -> None:
        """Write the step's row, then its checkpoint if one is due: a resumed run forgets rows beyond its
        checkpoint, but could not make up for one that is missing."""
        gap = self._main.work(f"records step {step}", lambda: self._recorded(step, update, scores))
        self.step = step
        drifted, every = not gap <= self.config.record.mismatch_bound, self.config.record.checkpoint_every
        if drifted or (every and step % every == 0):
            self.commit(step)
        if drifted:
            self._save()
            raise self._mismatch(step, f"by {gap:.3f} on average")

    def _recorded(self, step: int, update: Update | None, scores: Mapping[str, float]) -> float:
        """Rank 0's part of it: the gap between engine and learner, 0 where the update was skipped."""
        assert self.driver is not None and self._played is not None, "rank 0 has played"
        self._state = self._played.state
        return self.driver.record(step, self._played, self._dropped, update, scores)

    def _report(self) -> None:
        if self.driver:
            self.driver.report()
        self._main.meet()

    def _mismatch(self, step: int, how: str) -> MismatchError:
        return MismatchError(
            f"step {step}: log-probs of engine and learner differ {how}, beyond"
            f" record.mismatch_bound={self.config.record.mismatch_bound}; the state is saved. Compare the two"
            " with `spell-megatron parity`, or raise the bound"
        )

    def commit(self, step: int) -> None:
        """Save the state after `step`, on every rank; with `record.async_save` it is on its way to the disk."""
        self._placement.enter(Phase.SAVE)
        with self._phase("record"):
            self._checkpoints.save(step, self.learner, {"selfplay": self._state})

    def _save(self) -> None:
        """The state after the last step is on disk when this returns."""
        if self._checkpoints.saved != self.step:
            self.commit(self.step)
        self._say("saving")
        self._checkpoints.wait()

    def finish(self) -> None:
        """The last checkpoint, the exported model and the report."""
        self._save()
        self._placement.enter(Phase.SAVE)
        self._say("exporting the model")
        if self.driver:
            make_room(self.run.hf, "model")
        self.learner.save_hf(self.run.hf)
        self._say("writing the report")
        self._report()

    def _resume(self, origin: int | None) -> int:
        """Take over the newest whole checkpoint, or that of a step; the step, 0 at the very beginning."""
        self._placement.enter(Phase.SAVE)
        self._say("looking for a checkpoint")
        found = self._checkpoints.restore(self.learner, origin, self._main)
        if found is not None and self.driver:
            self.driver.selfplay.restore(found.run["selfplay"])
        step = found.step if found else 0
        if step or self.config.rollout.servers.urls:
            self.resync(step)
        return step

    def _together(self) -> None:
        """Return when every rank is here; rank 0 may have had engines to put to sleep."""
        self._main.meet()
        dist.barrier()

    def _shared(self, value: Value) -> Value:
        return share(value, self.world)

    def _say(self, phase: str) -> None:
        """Show what goes on outside the steps."""
        if self.driver:
            self.driver.live.phase(phase)

    def _phase(self, name: str) -> Any:
        return self.driver.phase(name) if self.driver else nullcontext()


@contextmanager
def open_session(
    config: Config,
    run: Path | None,
    benchmarks: Benchmarks | None = None,
    judges: Judges | None = None,
    *,
    origin: int | None = None,
) -> Iterator[Session]:
    """A session in the run folder `run`, resumed from its newest checkpoint; in a new folder where None.

    `origin` is another step to go on from, 0 the very beginning; what is later is set aside.
    `benchmarks` makes what measures `heldout.benchmarks` (`eval.live_benchmarks`; this room does not know it), and
    `judges` the judge of `selfplay.external_judge` (`eval.reward_judge`).
    """
    if config.selfplay.external_judge.url and judges is None:
        raise SpellError("selfplay.external_judge: pass eval.reward_judge, or train by the command line")
    if config.heldout.benchmarks and benchmarks is None:
        raise SpellError("heldout.benchmarks: pass eval.live_benchmarks, or train by the command line")
    check_replay(config)
    prompts_of(config)  # a template that cannot be used is named before anything is loaded
    policy = config.policy
    with working("waiting for the other ranks") if os.environ.get("RANK", "0") == "0" else nullcontext():
        world = start_world(
            policy.layout, seed=config.seed, timeout_seconds=policy.timeout_seconds, secret=_secret(run)
        )
    with ExitStack() as stack:
        stack.callback(stop_world)
        main = MainRank(world)
        stack.callback(main.close)
        stack.enter_context(private(config.record.group_readable))
        before = read_run_config(run) if run else config
        if run is None:
            run = main.work("makes the run folder", lambda: RunFolder.create(config.runs, config.name).path)
        folder = RunFolder(run)
        lock = _locked(folder, main, stack)
        if world.is_main:
            folder.close_to_others(config.record.group_readable)
            folder.save_config(dump_config(before))
        session = Session(config, folder, world, main, stack, benchmarks, judges, origin=origin, lock=lock)
        if world.is_main:
            if origin is not None or not same_episodes(before, config):
                forget_episodes(folder, after=session.step)
            folder.save_config(
                dump_config(config)
            )  # now that no episode of the one before is left to go on with
        yield session


def _secret(run: Path | None) -> str:
    """What the ranks of a launched run know each other by; a run without a launcher has none."""
    file = RunFolder(run).secret if run else None
    return read_secret(file) if file and file.exists() else ""


def _locked(folder: RunFolder, main: MainRank, stack: ExitStack) -> RunLock | None:
    """Rank 0's lock of the run folder. Raises SpellError, on every rank, where it cannot be had."""
    held: list[RunLock] = []

    def lock() -> SpellError | None:
        try:
            held.append(stack.enter_context(locked(folder.path)))
        except SpellError as error:
            return error
        return None

    if (fault := main.work("locks the run folder", lock)) is not None:
        raise fault
    return held[0] if held else None


def read_run_config(run: Path, overrides: tuple[str, ...] = ()) -> Config:
    """The configuration of an existing run."""
    return load_config(str(RunFolder.open(run).config), overrides)


def ranks_of_a_node(world: World, config: Config) -> int:
    """Ranks that share a node: as torchrun says, else as many as `cluster.nodes` makes of the world."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or max(1, world.size // config.cluster.nodes)


def share(value: Value, world: World) -> Value:
    """Rank 0's value, on every rank."""
    return agreed(value, dist.group.WORLD if world.size > 1 else None)
