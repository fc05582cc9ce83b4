"""Saving the states of a run, in the background where wanted.

A checkpoint is written under a `.partial` name and renamed when everything in it is on disk. Saving in the
foreground is saving in the background and waiting for it.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from spell_megatron.checkpoint import folder as disk
from spell_megatron.checkpoint.folder import Checkpoint
from spell_megatron.checkpoint.state import load_learner
from spell_megatron.checkpoint.write import Staged, Write, reason
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import Group, agreed
from spell_megatron.types import SpellError

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run folder: the last `keep_last`, and for good those of every `keep_every` steps.

    With `background`, `save` returns when the state is in host memory, and `wait` when it is on disk.
    """

    def __init__(
        self, folder: Path, keep_last: int = 2, *, keep_every: int = 0, background: bool = False
    ) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.background = background
        self.saved: int | None = None
        """Step of the last state that was taken over or whose saving has begun."""
        self._writing: tuple[Path, Write] | None = None
        self._group: Group = None

    def save(self, step: int, learner: Learner, run: dict[str, Any]) -> None:
        """Save the state after `step`; `run` is JSON. A collective, which waits for the save before.

        Raises SpellError where this or the former state cannot be written; the earlier ones are whole.
        """
        self.wait()
        group = self._joined(learner)
        partial, fault = disk.partial(self.folder, step), ""
        if learner.world.is_main:
            try:
                disk.begin(partial, step, run)
            except OSError as error:
                fault = reason(error, self.folder)
        if fault := agreed(fault, group):
            raise _unwritten(partial, fault)
        try:
            staged = Staged(learner, disk.learner_folder(partial))
        except (OSError, RuntimeError) as error:
            raise _unwritten(partial, reason(error, self.folder)) from error
        self.saved = step
        self._writing = partial, Write(staged, group, lambda files: self._commit(step, partial, files))
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk. Raises SpellError where that failed, on every rank."""
        if self._writing is not None:
            (partial, write), self._writing = self._writing, None
            if fault := write.wait():
                raise _unwritten(partial, fault)

    def close(self) -> None:
        """`wait`, for a process that is about to end: what goes wrong is only logged."""
        try:
            self.wait()
        except SpellError as fault:
            _log.error("%s", fault)

    def newest(self) -> Checkpoint | None:
        """The last whole checkpoint, or None where there is none. Logs which are skipped, and why."""
        return disk.newest(self.folder)

    def restore(self, learner: Learner) -> Checkpoint | None:
        """Take over the newest whole state, None where there is none. A collective."""
        found = agreed(self.newest() if learner.world.is_main else None, self._joined(learner))
        if found is not None:
            load_learner(learner, found)
            self.saved = found.step
        return found

    def _commit(self, step: int, partial: Path, learner_files: dict[str, str]) -> None:
        disk.commit(partial, learner_files)
        disk.retain(self.folder, step, self.keep_last, self.keep_every)

    def _joined(self, learner: Learner) -> Group:
        """The group of the writing threads, made by the first who needs it."""
        if self._group is None and learner.world.size > 1:
            patience = timedelta(seconds=learner.policy.timeout_seconds)
            self._group = dist.new_group(backend="gloo", timeout=patience)
        return self._group


def _unwritten(partial: Path, fault: str) -> SpellError:
    """Give back what the half-written state takes; the message."""
    disk.discard(partial)
    return SpellError(
        f"cannot write the checkpoint {partial.with_suffix('')}: {fault}; the earlier ones are whole."
        " Free some space or copy the run's folder elsewhere, then resume it"
    )
