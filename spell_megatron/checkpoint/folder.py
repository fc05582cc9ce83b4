"""Checkpoints on disk: which are whole, which is the newest, which may go."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.checkpoint.files import digests, names_below, sync, write_json
from spell_megatron.types import SpellError

_log = logging.getLogger(__name__)
_RUN, _FILES = "run.json", "files.json"
_PARTIAL, _GONE = ".partial", ".gone"
"""Endings of a folder that is being written, and of one that is being removed."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One committed state. `run` is what the caller gave to `save`."""

    path: Path
    step: int
    run: dict[str, Any]

    @property
    def learner(self) -> Path:
        return learner_folder(self.path)


def learner_folder(checkpoint: Path) -> Path:
    return checkpoint / "learner"


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest of a run's. Raises SpellError where there is no whole one."""
    if (path / _FILES).is_file():
        return verified(path)
    found = newest(path / "checkpoints")
    if found is None:
        raise SpellError(
            f"{path} holds no whole checkpoint: give a run folder or one of its checkpoints/step-…"
        )
    return found


def newest(folder: Path) -> Checkpoint | None:
    """The last whole checkpoint of a run, or None where there is none. Logs which are skipped, and why."""
    for _, path in reversed(committed(folder)):
        try:
            return verified(path)
        except SpellError as fault:
            _log.warning("skipped a checkpoint: %s", fault)
    return None


def verified(path: Path) -> Checkpoint:
    """A checkpoint all of whose files are as they were written. Raises SpellError."""
    try:
        files = dict(json.loads((path / _FILES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SpellError(f"{path} is not whole: {_FILES} cannot be read ({error})") from None
    found = digests(path, files.keys() | {_RUN})
    for name in (_RUN, *files):
        if name not in files or found.get(name) != files[name]:
            raise SpellError(f"{path} is not whole: {name} is {'damaged' if name in found else 'missing'}")
    record = json.loads((path / _RUN).read_text(encoding="utf-8"))
    return Checkpoint(path, record["step"], record["run"])


def committed(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint that was committed, in order of steps."""
    names = ((path.name.removeprefix("step-"), path) for path in folder.glob("step-*"))
    return sorted((int(step), path) for step, path in names if step.isdigit())


def partial(folder: Path, step: int) -> Path:
    """Where the state after `step` is written."""
    return folder / f"step-{step:05d}{_PARTIAL}"


def begin(partial: Path, step: int, run: dict[str, Any]) -> None:
    """Make the folder of a state that is to be written; all it holds yet is the run's part."""
    discard(partial)
    learner_folder(partial).mkdir(parents=True)
    write_json(partial / _RUN, {"step": step, "run": run})


def commit(partial: Path, learner_files: dict[str, str]) -> None:
    """Make a partial checkpoint one that counts; `learner_files` are digests of what is on disk already."""
    prefix = learner_folder(partial).relative_to(partial).as_posix()
    known = {f"{prefix}/{name}": digest for name, digest in learner_files.items()}
    others = names_below(partial) - known.keys()
    write_json(partial / _FILES, known | digests(partial, others))
    for name in others:
        sync(partial / name)
    sync(learner_folder(partial))
    sync(partial)
    final = partial.with_suffix("")
    discard(final)
    partial.rename(final)
    sync(final.parent)


def retain(folder: Path, step: int, last: int, every: int) -> None:
    """Keep the last few checkpoints and every so many steps' one; later ones than `step` were not whole."""
    steps = [other for other, _ in committed(folder) if other <= step]
    kept = {*steps[-last:], *(other for other in steps if every and other % every == 0)}
    for other, path in committed(folder):
        if other not in kept:
            discard(path)
    for path in (*folder.glob(f"*{_PARTIAL}"), *folder.glob(f"*{_GONE}")):
        discard(path)


def discard(path: Path) -> None:
    """Remove a checkpoint, if there is one; half removed it does not look like one. Several ranks may try."""
    gone = path.with_suffix(_GONE)
    if path != gone and path.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
