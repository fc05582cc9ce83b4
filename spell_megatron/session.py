"""A run on every rank: the learner and its checkpoints, in step with what rank 0 plays and records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from spell_megatron.checkpoint import Checkpoints, load_learner
from spell_megatron.config import Config, dump_config, load_config
from spell_megatron.driver import Driver
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.learner import Learner, Update
from spell_megatron.policy.world import World, start_world, stop_world
from spell_megatron.preemption import Preempted, Stop, listen, preempted
from spell_megatron.record import RunFolder
from spell_megatron.selfplay import HeldOutScore, Play, StarvedError
from spell_megatron.types import SpellError, TrainBatch
from spell_megatron.weights.locate import model_folder

Value = TypeVar("Value")


class MismatchError(SpellError):
    """Engine and learner have drifted apart beyond `record.mismatch_bound`."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """What rank 0 tells the others of a step: its batch, or why there is none."""

    batch: TrainBatch | None = None
    fault: str = ""
    """The step could not be filled."""


class Session:
    """What the training loop works with. `driver` is rank 0's part, None elsewhere. Use `open_session`."""

    def __init__(self, config: Config, run: RunFolder, world: World, stack: ExitStack) -> None:
        self.config, self.run, self.world = config, run, world
        self._stop: Stop = listen()
        sampling = config.selfplay.sampling
        model = model_folder(config.model.path)
        self.learner = Learner(
            config.policy, model, world, sampled=Sampled(sampling.temperature, sampling.top_p)
        )
        self.driver = Driver(config, run, model, stack, alone=world.size == 1) if world.is_main else None
        self._checkpoints = Checkpoints(run.checkpoints, config.record.keep_last)
        self._play: Play | None = None
        self.step = self._resume()
        self._state = self._selfplay_state()
        if self.driver:
            self.driver.begin(self.step)

    async def play(self, step: int) -> TrainBatch:
        """The step's batch, on every rank. Where there is none, the state is saved and the reason raised."""
        turn = _Turn()
        if self.driver:
            try:
                self._play = await self._stop.race(self.driver.play(step))
                turn = _Turn(self._play.batch.train if self._play else None)
            except StarvedError as error:
                turn = _Turn(fault=str(error))
        turn = self._shared(turn)
        if turn.batch is not None:
            return turn.batch
        if self._checkpoints.newest_step() != self.step:
            self.commit(self.step)
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
        with self._phase("update"):
            return self.learner.update(batch)

    def resync(self, step: int) -> None:
        """Give the engine the weights that `step` made. The stream is a collective: every rank drains it."""
        with self._phase("resync"):
            if self.driver:
                self.driver.resync(self.learner.weights(), step)
            else:
                for _ in self.learner.weights():
                    pass

    async def measure(self, step: int) -> HeldOutScore | None:
        """Held-out accuracy, where it is due: before the first step, every so many, and after the last."""
        every = self.config.heldout.every
        due = step in (0, self.config.steps) or (every and step % every == 0)
        return await self.driver.measure() if self.driver and due else None

    def record(self, step: int, update: Update, score: HeldOutScore | None) -> None:
        """Write the step's row, then its checkpoint if one is due: a resumed run forgets rows beyond its
        checkpoint, but could not make up for one that is missing."""
        gap = 0.0
        if self.driver and self._play:
            gap = self.driver.record(step, self._play, update, score)
        gap = self._shared(gap)
        self.step, self._state = step, self._selfplay_state()
        drifted, every = gap > self.config.record.mismatch_bound, self.config.record.checkpoint_every
        if drifted or (every and step % every == 0):
            self.commit(step)
        if drifted:
            raise MismatchError(
                f"step {step}: log-probs of engine and learner differ by {gap:.3f} on average, beyond"
                f" record.mismatch_bound={self.config.record.mismatch_bound}; the state is saved. Compare the two"
                " with `spell-megatron parity`, or raise the bound"
            )

    def commit(self, step: int) -> None:
        """Save the state after `step`, on every rank."""
        with self._phase("record"):
            self._checkpoints.save(step, self.learner, {"selfplay": self._state})

    def finish(self) -> None:
        """The last checkpoint, the exported model and the report."""
        if self._checkpoints.newest_step() != self.step:
            self.commit(self.step)
        self.learner.save_hf(self.run.hf)
        if self.driver:
            self.driver.report()

    def _resume(self) -> int:
        """Take over the newest whole checkpoint; the step that it was made after, 0 where there is none."""
        found = self._shared(self._checkpoints.newest() if self.world.is_main else None)
        if found is None:
            return 0
        load_learner(self.learner, found)
        if self.driver:
            self.driver.selfplay.restore(found.run["selfplay"])
        if found.step:
            self.resync(found.step)
        return found.step

    def _selfplay_state(self) -> dict[str, Any]:
        """Rank 0's state between two steps; a step that is given up must not be in it."""
        return self.driver.selfplay.state() if self.driver else {}

    def _shared(self, value: Value) -> Value:
        return share(value, self.world)

    def _phase(self, name: str) -> Any:
        return self.driver.phase(name) if self.driver else nullcontext()


@contextmanager
def open_session(config: Config, run: Path | None) -> Iterator[Session]:
    """A session in the run folder `run`, resumed from its newest checkpoint; in a new folder where None."""
    world = start_world(config.policy.layout, seed=config.seed, timeout_seconds=config.policy.timeout_seconds)
    with ExitStack() as stack:
        stack.callback(stop_world)
        if run is None:
            made = RunFolder.create(config.runs, config.name).path if world.is_main else None
            run = share(made, world)
        assert run is not None
        folder = RunFolder(run)
        if world.is_main:
            folder.save_config(dump_config(config))
        yield Session(config, folder, world, stack)


def read_run_config(run: Path, overrides: tuple[str, ...] = ()) -> Config:
    """The configuration of an existing run."""
    return load_config(str(RunFolder.open(run).config), overrides)


def share(value: Value, world: World) -> Value:
    """Rank 0's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
