"""Checkpoints on disk: which are whole, which is the newest, which may go.

Three things are kept apart. A whole checkpoint has every file as it was written. A damaged one has not: it is
renamed (`step-00012.suspect-1`) and never removed. One that cannot be read just now is neither: its file system is
asked again for a while, and then the run stops rather than go on without it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.base.files import replace_text, sync
from spell_megatron.policy.checkpoint.files import (
    Digester,
    absent,
    digests,
    inside,
    names_below,
    patiently,
    read_json,
    stamps,
    write_json,
)
from spell_megatron.types import SpellError

_log = logging.getLogger(__name__)
_RUN, _FILES = "run.json", "files.json"
_PARTIAL, _GONE, _SUSPECT = ".partial", ".gone", ".suspect-"
"""Endings of a folder that is being written, of one that is being removed, and of one that is set aside."""
_STEP = re.compile(r"step-([0-9]+)", re.ASCII)


class DamagedError(SpellError):
    """A checkpoint is not as it was written. The decision how to go on is the user's."""

    exit_code = 2


class UnreadableError(SpellError):
    """A checkpoint cannot be read just now: nothing is known of it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One committed state. `run` is what the caller gave to `save`."""

    path: Path
    step: int
    run: dict[str, Any]

    @property
    def learner(self) -> Path:
        return learner_folder(self.path)


Stamps = dict[str, tuple[int, int]]


class Whole:
    """Checkpoints that this process has found whole; files that have not changed since are not read again."""

    def __init__(self) -> None:
        self._seen: dict[Path, Stamps] = {}

    def note(self, path: Path) -> None:
        self._seen[path] = stamps(path, names_below(path))

    def check(self, path: Path) -> None:
        """Raises SpellError where the checkpoint is damaged or cannot be read."""
        try:
            if self._seen.get(path) == (now := stamps(path, names_below(path))):
                return
        except OSError as error:
            if not absent(error):
                raise UnreadableError(f"{path} cannot be read: {error}") from None
        verified(path)
        self._seen[path] = now

    def keep(self, paths: set[Path]) -> None:
        """Forget all others: a long run makes many."""
        self._seen = {path: seen for path, seen in self._seen.items() if path in paths}


def learner_folder(checkpoint: Path) -> Path:
    return checkpoint / "learner"


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest of a run's. Raises SpellError where there is no whole one."""
    if os.path.lexists(path / _FILES):
        return verified(path)
    found = newest(path / "checkpoints")
    if found is None:
        raise SpellError(
            f"{path} holds no whole checkpoint: give a run folder or one of its checkpoints/step-…"
        )
    return found


def newest(folder: Path, digester: Digester = digests) -> Checkpoint | None:
    """The last whole checkpoint of a run, None where none was ever committed. Logs which are skipped, and why.

    Raises SpellError where checkpoints were committed and none of them is whole, or the newest that may be cannot
    be read.
    """
    faults: list[str] = []
    for _, path in reversed(_listed(folder)):
        try:
            return verified(path, digester)
        except DamagedError as fault:
            _log.warning("skipped a checkpoint: %s", fault)
            faults.append(str(fault))
        except UnreadableError as fault:
            raise UnreadableError(f"{fault}. {_ways(folder)}") from None
    if faults:
        raise DamagedError(
            f"no checkpoint is whole, and nothing was begun again: {'; '.join(faults)}. {_ways(folder)}"
        )
    if (step := _noted(folder)) is not None:
        raise UnreadableError(
            f"{folder} holds no checkpoint, and one of step {step} was committed there: is a disk not mounted?"
            f" {_ways(folder)}"
        )
    return None


def at(folder: Path, step: int, digester: Digester = digests) -> Checkpoint:
    """The checkpoint of a step. Raises SpellError where it is not whole or not there."""
    steps = dict(_listed(folder))
    if step not in steps:
        have = ", ".join(f"step-{other}" for other in sorted(steps)) or "none"
        raise SpellError(f"{folder} has no checkpoint of step {step}; there are: {have}")
    return verified(steps[step], digester)


def verified(path: Path, digester: Digester = digests) -> Checkpoint:
    """A checkpoint all of whose files are as they were written.

    Raises DamagedError where they are not, UnreadableError where that cannot be found out.
    """
    try:
        return patiently(lambda: _verified(path, digester))
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None


def _verified(path: Path, digester: Digester) -> Checkpoint:
    if path.is_symlink() and not path.exists():
        raise OSError(errno.ENXIO, f"it is a link to {os.readlink(path)}, which is not there")
    try:
        files = read_json(path / _FILES)
        if not isinstance(files, dict) or not all(map(inside, files)):
            raise ValueError("it is no table of files")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not absent(error):
            raise
        raise DamagedError(f"{path} is not whole: {_FILES} cannot be read ({error})") from None
    found = digester(path, files.keys() | {_RUN})
    for name in (_RUN, *files):
        if name not in files or found.get(name) != files[name]:
            kind = "damaged" if name in found or os.path.lexists(path / name) else "missing"
            raise DamagedError(f"{path} is not whole: {name} is {kind}")
    try:
        record = read_json(path / _RUN)
        step, run = record["step"], record["run"]
        if not isinstance(step, int) or not isinstance(run, dict):
            raise TypeError("a step and a state belong there")
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{path} is not whole: {_RUN} cannot be read ({error})") from None
    if (named := _STEP.fullmatch(path.name)) and int(named[1]) != step:
        raise DamagedError(f"{path} is not whole: it holds step {step}")
    return Checkpoint(path, step, run)


def committed(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint that was committed, in order of steps. Raises OSError."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        if not folder.is_symlink():
            return []
        raise OSError(errno.ENXIO, f"it is a link to {os.readlink(folder)}, which is not there") from None
    found = ((_STEP.fullmatch(name), folder / name) for name in names)
    return sorted((int(step[1]), path) for step, path in found if step)


def partial(folder: Path, step: int) -> Path:
    """Where the state after `step` is written."""
    return folder / f"step-{step:05d}{_PARTIAL}"


def begin(partial: Path, step: int, run: dict[str, Any]) -> None:
    """Make the folder of a state that is to be written; all it holds yet is the run's part."""
    discard(partial)
    learner_folder(partial).mkdir(parents=True)
    write_json(partial / _RUN, {"step": step, "run": run})


def commit(partial: Path, learner_files: dict[str, str]) -> Path:
    """Make a partial checkpoint one that counts; `learner_files` are digests of what is on disk already.

    Where it succeeds a checkpoint of the same step, that one is set aside. Returns its path.
    """
    prefix = learner_folder(partial).relative_to(partial).as_posix()
    known = {f"{prefix}/{name}": digest for name, digest in learner_files.items()}
    others = names_below(partial) - known.keys()
    write_json(partial / _FILES, known | digests(partial, others))
    for name in others:
        sync(partial / name)
    sync(learner_folder(partial))
    sync(partial)
    final = partial.with_suffix("")
    step = int(final.name.removeprefix("step-"))
    for other, path in committed(final.parent):
        if other == step:  # under a name with other zeros, too
            set_aside(path)
    partial.rename(final)
    sync(final.parent)
    replace_text(_note(final.parent), json.dumps({"step": step}))
    return final


def retain(folder: Path, step: int, last: int, every: int, known: Whole | None = None) -> None:
    """Keep the last few whole checkpoints and every so many steps' one.

    Those that are damaged, and those later than `step`, are set aside and do not count. Nothing is removed before
    the ones that stay are known to be whole. Raises SpellError or OSError where that cannot be found out.
    """
    known = known or Whole()
    kept: set[Path] = set()
    steps = committed(folder)
    for other, path in reversed(steps):
        if other > step:
            set_aside(path)
        elif len(kept) < last:
            try:
                known.check(path)
                kept.add(path)
            except DamagedError as fault:
                _log.warning("set a checkpoint aside: %s", fault)
                set_aside(path)
    for other, path in steps:
        if other <= step and path not in kept and not (every and other % every == 0):
            discard(path)
    known.keep(kept)


def set_aside(path: Path) -> None:
    """Rename what is no checkpoint of this run any more; it is for the user to remove."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}{_SUSPECT}{number}")):
        number += 1
    with suppress(FileNotFoundError):
        path.rename(aside)


def set_aside_after(folder: Path, step: int) -> None:
    """Set aside all checkpoints later than `step`: the run goes on from there."""
    for other, path in committed(folder):
        if other > step:
            set_aside(path)


def forget(folder: Path) -> None:
    """Set aside all checkpoints: the run begins again."""
    set_aside_after(folder, -1)
    _note(folder).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed has left half-written or half-removed."""
    for name in os.listdir(folder) if folder.is_dir() else ():
        if name.startswith("step-") and name.endswith((_PARTIAL, _GONE)):
            discard(folder / name)


def discard(path: Path) -> None:
    """Remove a checkpoint, if there is one. It is renamed before, so that what an interruption leaves is not
    taken for one. Several ranks may call this at once."""
    gone = path.with_suffix(_GONE)
    if path != gone and path.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _listed(folder: Path) -> list[tuple[int, Path]]:
    try:
        return patiently(lambda: committed(folder))
    except OSError as error:
        raise UnreadableError(
            f"{folder} cannot be read: {error.strerror or error}. {_ways(folder)}"
        ) from None


def _note(folder: Path) -> Path:
    """The step of the last commit, beside the folder: where that is on a disk of its own, this is not."""
    return folder.with_name(folder.name + ".json")


def _noted(folder: Path) -> str | None:
    """The step of the last commit, as text; None where nothing was committed."""
    try:
        return str(patiently(lambda: read_json(_note(folder)))["step"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableError(f"{_note(folder)} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError):
        return "?"


def _ways(folder: Path) -> str:
    run = folder.parent
    return (
        "Bring the files back and resume, go on from another checkpoint with"
        f" `spell-megatron resume {run} --from step-N`, or begin again with `spell-megatron resume {run} --restart`"
    )
