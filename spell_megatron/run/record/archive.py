"""Rollouts of steps that nothing goes back to: compressed or removed, so that weeks of a run do not fill a disk."""

from __future__ import annotations

import gzip
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spell_megatron.config import RecordConfig
from spell_megatron.run.record.folder import RunFolder

_log = logging.getLogger(__name__)


class Archive:
    """Puts away what is older than `record.keep_rollouts` steps, on a thread of its own: a step does not wait.

    Each step looks at one file alone. What cannot be put away stays, with a warning.
    """

    def __init__(self, folder: RunFolder, record: RecordConfig) -> None:
        self._folder, self._record = folder, record
        self._kept = kept_steps(record)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="archive")

    def begin(self, step: int) -> None:
        """Put away whatever is old after `step`, which a run of other settings may have left."""
        if self._kept is not None:
            for old in self._folder.recorded_steps:
                if old <= step - self._kept:
                    self._put_away(old)

    def after(self, step: int) -> None:
        """Put away the one step that has become old by `step`."""
        if self._kept is not None and step > self._kept:
            self._put_away(step - self._kept)

    def close(self) -> None:
        self._worker.shutdown(wait=True)

    def _put_away(self, step: int) -> None:
        self._worker.submit(_put_away, *self._folder.rollout_files(step), self._record.old_rollouts)


def kept_steps(record: RecordConfig) -> int | None:
    """Steps whose rollouts stay; None where all do, since a resume may need any."""
    if record.checkpoint_every == 0:
        return None
    return max(record.keep_rollouts, record.checkpoint_every * (record.keep_last + 1))


def _put_away(path: Path, packed: Path, how: str) -> None:
    part = packed.with_name(f"{packed.name}.part")
    try:
        if not path.is_file():
            return
        if how == "compress":
            with path.open("rb") as source, gzip.open(part, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            part.replace(packed)
        path.unlink()
    except OSError as error:
        _log.warning("%s is not put away: %s", path, error)
