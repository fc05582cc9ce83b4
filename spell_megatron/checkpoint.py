"""Learner state and run state, committed together: a crash leaves the last good state, never a mixed one.

    checkpoints/step-00012/
        learner/     megatron-core's distributed checkpoint: weights, optimizer, schedule, random state
        run.json     the step, the state of self-play, and size and digest of every file

A checkpoint is written under a `.partial` name and renamed when everything in it is on disk. `newest` takes
the last one whose files are all whole, and says which it skipped and why. Layouts may change between save
and resume: tensors are stored whole-model, and every rank loads its own part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu

from spell_megatron.policy.learner import Learner
from spell_megatron.types import SpellError

_log = logging.getLogger(__name__)
_RUN = "run.json"
_LEARNER = "learner"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One committed state. `run` is what the caller gave to `save`."""

    path: Path
    step: int
    run: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder; keeps the last `keep_last`."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self.keep_last = folder, keep_last

    def save(self, step: int, learner: Learner, run: dict[str, Any]) -> Path:
        """Commit the state after `step`. A collective; rank 0 writes the run's part."""
        final = self.folder / f"step-{step:05d}"
        partial = final.with_suffix(".partial")
        main = learner.world.is_main
        try:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / _LEARNER).mkdir(parents=True)
            dist.barrier()
            save_learner(learner, partial / _LEARNER)
            if main:
                _write_json(partial / _RUN, {"step": step, "run": run, "files": _digests(partial)})
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                _sync_folder(self.folder)
                for old in self._all()[: -self.keep_last]:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise SpellError(
                f"cannot write the checkpoint {final}: {error}; the earlier ones are whole."
                " Free space or choose another folder with runs=…, then resume"
            ) from None
        dist.barrier()
        return final

    def newest(self) -> Checkpoint | None:
        """The last whole checkpoint, or None where there is none."""
        for path in reversed(self._all()):
            try:
                return _verified(path)
            except SpellError as fault:
                _log.warning("skipped a checkpoint: %s", fault)
        return None

    def newest_step(self) -> int | None:
        """Step of the last committed checkpoint, unverified."""
        paths = self._all()
        return int(paths[-1].name.removeprefix("step-")) if paths else None

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest of a run's. Raises SpellError where there is no whole one."""
    if (path / _RUN).is_file():
        return _verified(path)
    found = Checkpoints(path / "checkpoints").newest()
    if found is None:
        raise SpellError(
            f"{path} holds no whole checkpoint: give a run folder or one of its checkpoints/step-…"
        )
    return found


def save_learner(learner: Learner, folder: Path) -> None:
    """Write weights, optimizer, schedule and random state of all ranks into an empty folder."""
    learner.settle()
    fresh = learner.schedule.num_steps == 0
    dist_checkpointing.save(_sharded_state(learner, loading=False, fresh=fresh), str(folder))


def load_learner(learner: Learner, checkpoint: Checkpoint) -> None:
    """Take over the state that `save_learner` wrote, in this learner's own layout."""
    folder = str(checkpoint.path / _LEARNER)
    try:
        fresh = dist_checkpointing.load_common_state_dict(folder)["schedule"]["num_steps"] == 0
        state = dist_checkpointing.load(_sharded_state(learner, loading=True, fresh=fresh), folder)
    except Exception as error:
        raise SpellError(
            f"the checkpoint {checkpoint.path} does not fit the configured model: {error}"
        ) from error
    for index, chunk in enumerate(learner.chunks):
        chunk.load_state_dict(state[_chunk_key(learner, index)], strict=False)
    if not fresh:
        learner.optimizer.load_state_dict(state["optimizer"])
    learner.schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"])


def _sharded_state(learner: Learner, *, loading: bool, fresh: bool) -> dict[str, Any]:
    """Before its first step an optimizer has no state: a `fresh` one is left out."""
    metadata = {
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",  # the one that survives a change of layout
    }
    models = {
        _chunk_key(learner, index): chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(learner.chunks)
    }
    optimizer: dict[str, Any] = {}
    if not fresh:
        state = learner.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
        optimizer = {"optimizer": state}
    return {
        **models,
        **optimizer,
        "schedule": learner.schedule.state_dict(),
        "rng": torch.get_rng_state(),
    }


def _chunk_key(learner: Learner, index: int) -> str:
    """Megatron-core's names: `model`, or `model0`, `model1` … where the schedule is interleaved."""
    return "model" if len(learner.chunks) == 1 else f"model{index}"


def _verified(path: Path) -> Checkpoint:
    try:
        record = json.loads((path / _RUN).read_text(encoding="utf-8"))
        step, run, files = int(record["step"]), dict(record["run"]), dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpellError(f"{path} is not whole: {_RUN} cannot be read ({error})") from None
    found = _digests(path)
    for name, digest in files.items():
        if found.get(name) != digest:
            raise SpellError(f"{path} is not whole: {name} is {'damaged' if name in found else 'missing'}")
    return Checkpoint(path, step, run)


def _digests(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, by relative name."""
    files = sorted(_files(folder))
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(_digest, files))
    return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.name != _RUN)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
