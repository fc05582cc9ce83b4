"""A run on every rank: the learner and its checkpoints, in step with what rank 0 plays and records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch.distributed as dist
from torch import Tensor

from spell_megatron.base.outputs import make_room
from spell_megatron.base.placement import Phase, Placement
from spell_megatron.base.pulse import working
from spell_megatron.config import Config
from spell_megatron.policy.agreement import Value, share
from spell_megatron.policy.checkpoint import Checkpoints
from spell_megatron.policy.colocation import LearnerOffload
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.learner import Learner, Update
from spell_megatron.policy.mismatch import groups_beyond
from spell_megatron.policy.scores import Scores
from spell_megatron.policy.soundness import UnsoundError, entropy_beyond
from spell_megatron.policy.waiting import MainRank
from spell_megatron.policy.world import World
from spell_megatron.rollout import backend
from spell_megatron.rollout.colocation import EngineOffload, Vacancy
from spell_megatron.rollout.engine import WeightsWanted
from spell_megatron.run.driver import Driver, Measurement, Played
from spell_megatron.run.follower import Follower
from spell_megatron.run.preemption import Preempted, Stop, attempt, listen, preempted
from spell_megatron.run.record import RunFolder, RunLock
from spell_megatron.run.record.folder import writing
from spell_megatron.selfplay.ports import Judge
from spell_megatron.types import SpellError, TrainBatch
from spell_megatron.weights.known import known_folder
from spell_megatron.weights.locate import model_folder

Benchmarks = Callable[[Config], Measurement | None]
Judges = Callable[[Config], Judge | None]


_SKIPS = 3
"""Bad steps in a row after which a run ends, whatever `record.bad_step` says."""


_LOSSES = 20
"""All engines may be lost so often over one piece of work; what ends them would otherwise do so for ever."""


class EnginesLostError(SpellError):
    """Engines end whenever they do a certain work."""


class BadStepError(SpellError):
    """A step whose update was not made, or not kept."""


class MismatchError(SpellError):
    """Engine and learner have drifted apart beyond `record.mismatch_bound`."""

    exit_code = 2  # the state is saved: another attempt would train past the gap, not mend it


@dataclass(frozen=True, slots=True)
class _Turn:
    """What rank 0 tells the others of a step: its batch, or why there is none."""

    batch: TrainBatch | None = None
    fault: str = ""
    """Why the step could not be played."""
    exit_code: int = SpellError.exit_code


@dataclass(frozen=True, slots=True)
class Collected:
    """What a step trains on: the same batch on every rank, and on rank 0 the play that it came from."""

    step: int
    batch: TrainBatch
    played: Played | None = None


@dataclass(frozen=True, slots=True)
class Updated:
    """What became of a step's batch: its update (None where it was skipped), without the groups that were dropped."""

    update: Update | None
    dropped: frozenset[int] = frozenset()


class Run:
    """What the training loop works with, on every rank. `lead` is what only rank 0 has to do, and nothing elsewhere.

    Use `open_run`.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        world: World,
        main: MainRank,
        stack: ExitStack,
        benchmarks: Benchmarks | None = None,
        judges: Judges | None = None,
        *,
        origin: int | None = None,
        lock: RunLock | None = None,
    ) -> None:
        self.config, self.folder, self.world, self._main = config, folder, world, main
        self._stop: Stop = listen()
        sampling = config.selfplay.sampling
        model = model_folder(config.model.path)
        with working("loading the model") if world.is_main else nullcontext():
            self.learner = Learner(
                *(config.policy, model, world),
                sampled=Sampled(sampling.temperature, sampling.top_p),
                families=config.model.families,
            )
        self._found = backend.here(config, ranks_of_a_node(world, config))
        self._placement = Placement(self._together)
        if self._found.colocated:
            self._placement.admit(LearnerOffload(self.learner))
        self._placement.enter(Phase.BUILD)
        self._vacancy: Vacancy | None = None
        # What engines know by no name of its own stands there under another (`weights/known.py`).
        served = folder.path / "engine" / "model" if self.learner.shape.family.like else model
        self.lead: Driver | Follower = Follower(served, self._found.transfer, folder.engine_cache)
        stack.callback(self.lead.close)
        main.work(
            "reads the corpus and starts the engines",
            lambda: self._lead(known_folder(model, served, config.model.families), stack, benchmarks, judges),
        )
        if self._found.colocated and isinstance(self.lead, Driver):
            if self._vacancy:
                self._placement.admit(self._vacancy)  # first: it says no before memory is taken
            self._placement.admit(EngineOffload(self.lead.engine))
        record = config.record
        self._checkpoints = Checkpoints(
            folder.checkpoints,
            record.keep_last,
            keep_every=record.keep_every,
            background=record.async_save,
            lost=lock.lost if lock else lambda: None,
        )
        stack.callback(self._checkpoints.close)
        self._lost = lock.lost if lock else lambda: None
        self._skipped = 0
        self.step = self._resume(origin)
        self._state = self.lead.state()
        self.lead.begin(self.step)

    def _lead(
        self, model: Path, stack: ExitStack, benchmarks: Benchmarks | None, judges: Judges | None
    ) -> None:
        """Build rank 0's part. No rank has device memory, so servers on other nodes may start, too."""
        if self._found.colocated and self.config.rollout.servers.urls:
            self._vacancy = Vacancy(self.folder.vacated(attempt()))
        measurement = benchmarks(self.config) if benchmarks else None
        self.lead = Driver(
            *(self.config, self.folder, model, stack, self._found),
            stop=self._stop,
            benchmarks=measurement,
            judge=judges(self.config) if judges else None,
        )

    def collect(self, step: int) -> Collected:
        """The step's batch, on every rank. Where there is none, the state is saved and the reason raised."""
        plays: list[Played] = []
        try:
            turn = self._with_engines(
                f"plays step {step}", lambda driver: self._turn(driver, step, plays), step - 1
            )
        except EnginesLostError as fault:
            turn = _Turn(fault=str(fault))
        if turn.batch is not None:
            return Collected(step, turn.batch, *plays)
        if turn.fault:
            self._save()
            self._report()
            error = SpellError(turn.fault)
            error.exit_code = turn.exit_code
            raise error
        raise self._stopped()

    def _stopped(self) -> Preempted:
        """Save the run and mark it as one that goes on later; the reason to leave, on every rank."""
        self._save()
        self._report()
        if self.world.is_main:
            return preempted(self.folder.path, self.step, self._stop)
        return Preempted("asked to stop")

    def _turn(self, driver: Driver, step: int, plays: list[Played]) -> _Turn:
        try:
            played = driver.play(step)
        except WeightsWanted:
            driver.rewind(self._state)
            raise
        except SpellError as error:
            return _Turn(fault=str(error), exit_code=error.exit_code)
        if played is None:
            return _Turn()
        plays.append(played)
        return _Turn(played.play.batch.train)

    def _with_engines(self, doing: str, work: Callable[[Driver], Value], step: int) -> Value:
        """What rank 0 does with engines that hold the weights of `step`; its result, on every rank.

        Of weights that go from every rank to its own device no copy is kept: where all engines ended and came
        back, they are sent again, and the work is done again. Raises EnginesLostError where that does not help.
        """
        for loss in range(_LOSSES):
            if loss:
                self.resync(step)
            self._placement.enter(Phase.GENERATE)
            value, done = self._main.work(doing, lambda: self._once(work))
            if done:
                return cast("Value", value)
        raise EnginesLostError(
            f"rank 0 {doing}, and lost all engines {_LOSSES} times over it, though they came back each time: a request"
            f" may be what ends them. Their logs, in {self.folder.path / 'engines'}, say more"
        )

    def _once(self, work: Callable[[Driver], Value]) -> tuple[Value | None, bool]:
        """Its result and True, or False where the engines have to be given the weights again."""
        try:
            return work(self._driver), True
        except WeightsWanted as wanted:
            self.lead.note(str(wanted))
            return None, False

    @property
    def _driver(self) -> Driver:
        """Rank 0's: for what is done there alone."""
        assert not isinstance(self.lead, Follower)
        return self.lead

    def update(self, collected: Collected) -> Updated:
        """One update, of the groups that are within `record.mismatch_bound` where others are to be dropped.

        It is left out where it must not be made and `record.bad_step` says to go on.
        """
        self._placement.enter(Phase.UPDATE)
        dropped: frozenset[int] = frozenset()
        with self.lead.phase("update"):
            try:
                self._check_reward(collected)
                if self.config.record.mismatch_action == "drop":
                    dropped = self._beyond_bound(collected)
                update = self.learner.update(collected.batch.without(dropped), self._judge)
            except UnsoundError as fault:
                self._bad(fault, collected, dropped)
                return Updated(None, dropped)
        self._skipped = 0
        return Updated(update, dropped)

    def _check_reward(self, collected: Collected) -> None:
        """Raise UnsoundError, on every rank, where the step's play has no reward worth learning from."""
        low, played = self.config.record.reward_min, collected.played
        if low is None:
            return
        mean = share(lambda: self._driver.reward(played) if played else None, self.world)
        if mean is not None and not mean >= low:
            raise UnsoundError(f"the responder's mean reward is {mean:.3g}, below record.reward_min={low:g}")

    def _judge(self, scores: Scores) -> UnsoundError | None:
        record = self.config.record
        return entropy_beyond(scores.entropy, record.entropy_min, record.entropy_max)

    def _bad(self, fault: UnsoundError, collected: Collected, dropped: frozenset[int]) -> None:
        """Go on to the next step or raise: with the state of before on disk, unless the weights are touched."""
        self._skipped += 1
        step = self.step + 1
        where = ""
        if fault.group is not None:
            where = f" in group {fault.group}{_described(fault.group, collected, dropped)}"
        what = f"step {step}: {fault}{where}"
        if self.config.record.bad_step == "skip" and self._skipped < _SKIPS and not fault.touched:
            self.lead.note(f"{what}; the step is skipped")
            return
        code = BadStepError.exit_code
        kept = "its weights are not saved; `resume` goes on from the last checkpoint"
        if not fault.touched:
            self._save()
            if fault.group is None:
                code, again = 2, "makes the same step again"  # of the same episodes, with the same weights
            else:
                self.lead.set_aside(step)  # or every resume would read it again
                again = "asks for its episodes anew"
            kept = f"nothing was updated, and the state after step {self.step} is saved; `resume` {again}"
        self._checkpoints.wait()
        bad = BadStepError(
            f"{what}; {kept}. Look at the rollouts and metrics of the steps before; a smaller"
            " policy.optimizer.lr, or record.bad_step=skip, may help"
        )
        bad.exit_code = code
        raise bad from None

    def _beyond_bound(self, collected: Collected) -> frozenset[int]:
        """The groups on which engine and learner do not agree. Costs a forward pass over the batch."""
        self.learner.check()
        batch, bound = collected.batch, self.config.record.mismatch_bound
        scores = self.learner.score(batch)
        version = collected.step - 1
        dropped = share(lambda: groups_beyond(batch, scores, bound, version), self.world)
        if len(dropped) == len(batch.groups):
            self._save()
            self.lead.set_aside(collected.step)  # a resume with another engine asks for its episodes anew
            raise self._mismatch(collected.step, f"by more than {bound} in every group of the batch")
        return dropped

    def resync(self, step: int) -> None:
        """Give the engine the weights that `step` made. A collective: every rank takes its part in it."""
        self._placement.enter(Phase.RESYNC)
        with self.lead.phase("resync"):
            self.lead.engine.update_weights(self._at_once(self.learner.engine_weights()), step)

    def _at_once(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A stream that begins on every rank when rank 0 begins it: engines may have to finish requests before."""
        self._main.meet()
        yield from stream

    def measure(self, step: int) -> dict[str, float]:
        """Scores by name, where they are due: before the first step, every so many, and after the last."""
        every = self.config.heldout.every
        due = step == 0 or step >= self.config.steps or (every and step % every == 0)
        doing = f"measures after step {step}"
        return self._with_engines(doing, lambda driver: driver.measure(step), step) if due else {}

    def begin(self) -> None:
        """Measure the weights that the run goes on from, where nobody has: before the first step, where a stop broke
        that off, or where the run ends with them by its new number of steps."""
        if self.step == 0 or self._owes():
            self.lead.record_scores(self.step, self.measure(self.step))

    def _owes(self) -> bool:
        """Whether the weights of the present step were to be measured and are not."""
        return self._main.work("looks whether something was not measured", lambda: self._driver.owes)

    def record(self, collected: Collected, updated: Updated, scores: Mapping[str, float]) -> None:
        """Write the step's row, then its checkpoint if one is due: a resumed run forgets rows beyond its
        checkpoint, but could not make up for one that is missing."""
        self._check_lock()
        step, played = collected.step, collected.played
        gap = self._main.work(
            f"records step {step}",
            lambda: self._driver.record(step, played, updated.dropped, updated.update, scores),
        )
        self.step, self._state = step, played.state if played else {}
        drifted, every = not gap <= self.config.record.mismatch_bound, self.config.record.checkpoint_every
        if drifted or (every and step % every == 0):
            self.commit(step)
        if drifted:
            self._save()
            raise self._mismatch(step, f"by {gap:.3f} on average")

    def _check_lock(self) -> None:
        """Raise, on every rank, where rank 0 has lost the lock of the run's folder."""
        if gone := self._main.work("looks whether the run is still its own", self._lost):
            raise gone

    def _report(self) -> None:
        self.lead.report()
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
        with self.lead.phase("record"):
            self._checkpoints.save(step, self.learner, {"selfplay": self._state})

    def _save(self) -> None:
        """The state after the last step is on disk when this returns."""
        self._check_lock()
        if self._checkpoints.saved != self.step:
            self.commit(self.step)
        self.lead.say("saving")
        self._checkpoints.wait()

    def finish(self) -> None:
        """The last checkpoint, the exported model and the report."""
        if self._owes():
            raise self._stopped()
        self._save()
        self._placement.enter(Phase.SAVE)
        self.lead.say("exporting the model")
        if self.world.is_main:
            with writing(self.folder.hf):
                make_room(self.folder.hf, "model")
        self.learner.save_hf(self.folder.hf)
        self.lead.say("writing the report")
        self._report()

    def _resume(self, origin: int | None) -> int:
        """Take over the newest whole checkpoint, or that of a step; the step, 0 at the very beginning."""
        self._placement.enter(Phase.SAVE)
        self.lead.say("looking for a checkpoint")
        found = self._checkpoints.restore(self.learner, origin, self._main)
        if found is not None:
            self.lead.restore(found.run["selfplay"])
        step = found.step if found else 0
        if step or self.config.rollout.servers.urls:
            self.resync(step)
        return step

    def _together(self) -> None:
        """Return when every rank is here; rank 0 may have had engines to put to sleep."""
        self._main.meet()
        dist.barrier()


def _described(group: int, collected: Collected, dropped: frozenset[int]) -> str:
    """A group's role and task, known to rank 0."""
    if collected.played is None:
        return ""
    batch = collected.played.play.batch.without(dropped)
    return f" ({batch.roles[group]}, {batch.tasks[group]})"


def ranks_of_a_node(world: World, config: Config) -> int:
    """Ranks that share a node: as whoever started them says, else as many as `cluster.nodes` makes of the world."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or max(1, world.size // config.cluster.nodes)
