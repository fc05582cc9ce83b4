"""Saving the states of a run, in the background where wanted.

A checkpoint is written under a `.partial` name and renamed when everything in it is on disk. Saving in the
foreground is saving in the background and waiting for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from spell_megatron.policy.agreement import Group, agreed
from spell_megatron.policy.checkpoint import folder as disk
from spell_megatron.policy.checkpoint.faults import reason
from spell_megatron.policy.checkpoint.files import Digester, digests
from spell_megatron.policy.checkpoint.folder import Checkpoint
from spell_megatron.policy.checkpoint.search import SharedSearch
from spell_megatron.policy.checkpoint.state import load_learner
from spell_megatron.policy.checkpoint.write import HostCopy, Staged, Write
from spell_megatron.policy.learner import HeldPolicy, Learner
from spell_megatron.policy.waiting import MainRank
from spell_megatron.types import SpellError

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run folder: the last `keep_last`, and for good those of every `keep_every` steps.

    With `background`, `save` returns when the state is in host memory, and `wait` when it is on disk. `lost` says
    why nothing may be written any more, None while it may.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        *,
        keep_every: int = 0,
        background: bool = False,
        lost: Callable[[], SpellError | None] = lambda: None,
    ) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.background, self._lost = background, lost
        self.saved: int | None = None
        """Step of the last state that was taken over or whose saving has begun."""
        self._writing: tuple[Path, Write] | None = None
        self._group: Group = None
        self._whole = disk.Whole()
        self._copy = HostCopy() if background else None

    def save(self, step: int, learner: HeldPolicy, run: dict[str, Any]) -> None:
        """Save the state after `step`; `run` is JSON. A collective, which waits for the save before.

        Raises SpellError where this or the former state cannot be written; the earlier ones are whole.
        """
        self.wait()
        main, group = learner.world.is_main, self._joined(learner)
        if gone := agreed(self._lost() if main else None, group):
            raise gone
        partial, fault = disk.partial(self.folder, step), ""
        if main:
            try:
                disk.begin(partial, step, run)
            except OSError as error:
                fault = reason(error, self.folder)
        if fault := agreed(fault, group):
            raise _unwritten(partial, fault)
        try:
            staged = Staged(learner, disk.learner_folder(partial), self._copy)
        except Exception as error:
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
                if gone := agreed(self._lost(), self._group):
                    raise gone  # whose the folder is now may be writing under that very name
                raise _unwritten(partial, fault)

    def close(self) -> None:
        """`wait`, for a process that is about to end: what goes wrong is only logged."""
        try:
            self.wait()
        except SpellError as fault:
            _log.error("%s", fault)

    def newest(self) -> Checkpoint | None:
        """The last whole checkpoint, None where none was ever committed. Raises SpellError, as `folder.newest`."""
        return disk.newest(self.folder)

    def restore(
        self, learner: Learner, origin: int | None = None, rank_0: MainRank | None = None
    ) -> Checkpoint | None:
        """Take over the newest whole state, or that of the step `origin`; None at the very beginning. A collective.

        Checkpoints that are damaged, or later than the one taken, are set aside once it is taken: with an `origin`
        of 0 all of them. Raises SpellError, on every rank, where checkpoints were committed and none can be taken.
        A single process needs no `rank_0`.
        """
        main, group = learner.world.is_main, self._joined(learner)
        search = SharedSearch(learner.world, group, rank_0 or MainRank(learner.world))
        found = _outcome(search.outcome(lambda digester: self._chosen(origin, digester)))
        if found is not None:
            load_learner(learner, found)
            self.saved = found.step
        _outcome(agreed(self._settled(found, origin) if main else None, group))
        return found

    def _chosen(self, origin: int | None, digester: Digester = digests) -> Checkpoint | SpellError | None:
        try:
            if origin:
                return disk.at(self.folder, origin, digester)
            return disk.newest(self.folder, digester) if origin is None else None
        except (OSError, SpellError) as fault:
            return self._unreadable(fault)

    def _settled(self, found: Checkpoint | None, origin: int | None) -> SpellError | None:
        """Leave nothing that is later than what was taken."""
        try:
            disk.sweep(self.folder)
            if found is not None:
                disk.set_aside_after(self.folder, found.step)
                self._whole.note(found.path)
            elif origin == 0:
                disk.forget(self.folder)
        except OSError as fault:
            return self._unreadable(fault)
        return None

    def _unreadable(self, fault: OSError | SpellError) -> SpellError:
        return (
            fault if isinstance(fault, SpellError) else SpellError(f"{self.folder} cannot be read: {fault}")
        )

    def _commit(self, step: int, partial: Path, learner_files: dict[str, str]) -> None:
        if gone := self._lost():
            raise gone
        final = disk.commit(partial, learner_files)
        try:
            self._whole.note(final)
            disk.retain(self.folder, step, self.keep_last, self.keep_every, self._whole)
        except (OSError, SpellError) as fault:
            _log.warning("no old checkpoint was removed: %s", fault)

    def _joined(self, learner: HeldPolicy) -> Group:
        """The group of the writing threads, made by the first who needs it."""
        if self._group is None and learner.world.size > 1:
            patience = timedelta(seconds=learner.policy.timeout_seconds)
            self._group = dist.new_group(backend="gloo", timeout=patience)
        return self._group


def _unwritten(partial: Path, fault: str) -> SpellError:
    """Give back what the half-written state takes; the message."""
    with suppress(OSError):  # whatever keeps it from being written
        disk.discard(partial)
    return SpellError(
        f"cannot write the checkpoint {partial.with_suffix('')}: {fault}; the earlier ones are whole."
        " Free some space or copy the run's folder elsewhere, then resume it"
    )


def _outcome(value: Checkpoint | SpellError | None) -> Checkpoint | None:
    if isinstance(value, SpellError):
        raise value
    return value
