"""A run's folder: what stands where, and files that are only ever appended to.

runs/<name>-<time>/
    config.yaml            every key of the configuration
    metrics.jsonl          one line a step
    tensorboard/           the same, for TensorBoard
    rollouts/step-00001.jsonl   the step's finished episodes, readable
    rollouts/step-00001.jsonl.gz   of an old step (record.keep_rollouts); .bad: set aside
    checkpoints/           learner and run state, committed together
    hf/                    the exported model
    corpus/                prepared clusters (corpus.store)
    corpus.json            what its sources held, and what of them was left out
    report.html  run.log
    engines.secret         of a launched run: what its ranks and servers know each other by
"""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from spell_megatron.base import files
from spell_megatron.base.ownership import own
from spell_megatron.config import Config, ServersConfig
from spell_megatron.types import SpellError

logger = logging.getLogger(__name__)

_TAIL = 1 << 20
_left: dict[Path, SpellError] = {}


class RunLockedError(SpellError):
    """Another process is at work in the run folder."""

    exit_code = 2  # another attempt would end alike


def leave(run: Path, why: SpellError) -> None:
    """From here on this process writes no record and no model in a run's folder: another one may be at work there."""
    _left[run] = why


def enter(run: Path) -> None:
    """A run's folder is this process' again."""
    _left.pop(run, None)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the faults of a file system into one clear message. Raises why a run was to be left, if it was."""
    for run, why in _left.items():
        if path.is_relative_to(run):
            raise why
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpellError(
                f"the disk is full: cannot write {path}; free some space, then resume the run"
            ) from error
        raise SpellError(
            f"cannot write {path}: {error.strerror or error}; choose another folder with runs=…"
        ) from error


class RunFolder:
    """Paths of one run. `create` makes a new run, `open` goes on with one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.hf = path / "hf"
        self.corpus = path / "corpus"
        self.sources = path / "corpus.json"
        self.report = path / "report.html"
        self.log = path / "run.log"
        self.secret = path / "engines.secret"

    @classmethod
    def create(cls, runs: str | Path, name: str) -> RunFolder:
        """Make `runs/<name>-<time>/`. Raises SpellError where it cannot be made."""
        if not name.isprintable() or name != os.path.basename(name) or name in ("", ".", ".."):
            raise SpellError(f"name={name!r} cannot name a folder: use letters, digits, dots and dashes")
        stem = Path(runs).expanduser() / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        path, again = stem, 1
        with writing(stem):
            while True:
                try:
                    path.mkdir(parents=True)
                    break
                except FileExistsError:
                    if not path.is_dir():
                        raise
                    again += 1
                    path = stem.with_name(f"{stem.name}-{again}")
            run = cls(path)
            for folder in (run.path / "rollouts", run.checkpoints):
                folder.mkdir()
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run. Raises SpellError where the folder is not one."""
        run = cls(Path(path).expanduser())
        if not run.config.is_file():
            raise SpellError(f"{path} is not a run's folder: it has no config.yaml")
        return run

    def close_to_others(self, group_readable: bool) -> None:
        """Whatever stands in the folder, only its owner (and the group) gets there."""
        with writing(self.path):
            if self.path.stat().st_uid == os.getuid():
                self.path.chmod(0o750 if group_readable else 0o700)

    @property
    def engine_cache(self) -> Path:
        """Where vLLM keeps what it compiles, which later runs of this user load and execute.

        Beside the run; within it where that cannot be written, or is another user's. Where somebody else could put
        another folder into the place of either, in the user's cache, or at last in the temporary folder.
        """
        for folder in self._caches():
            with suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if own(folder) and os.access(folder, os.W_OK):
                    return folder
        return self.path / "engine"

    def _caches(self) -> Iterator[Path]:
        yield self.path.parent / f".engine-{os.getuid()}"
        yield self.path / "engine"
        with suppress(RuntimeError):  # nobody knows the user's home
            home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
            yield Path(home).expanduser() / "spell-megatron" / "engine"
        yield Path(tempfile.gettempdir()) / f"spell-megatron-engine-{os.getuid()}"

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"step-{step:05d}.jsonl"

    def vacated(self, attempt: str) -> Path:
        """A file that is there while the trainer of an attempt is built and not in the devices' memory: servers that
        share its GPUs on other nodes may start then alone."""
        return self.path / f".vacated-{attempt}"

    def rollout_files(self, step: int) -> tuple[Path, Path]:
        """Where they are as they were written, and where when they have been put away."""
        path = self.rollouts(step)
        return path, path.with_name(f"{path.name}.gz")

    @property
    def recorded_steps(self) -> list[int]:
        """Steps whose rollouts are here and not packed, in order."""
        return self._steps("step-*.jsonl")

    @property
    def played_steps(self) -> list[int]:
        """Steps whose rollouts are here, packed or not, in order."""
        return sorted({*self.recorded_steps, *self._steps("step-*.jsonl.gz")})

    def _steps(self, pattern: str) -> list[int]:
        names = (path.name.partition(".")[0] for path in (self.path / "rollouts").glob(pattern))
        return sorted(int(step) for name in names if (step := name.removeprefix("step-")).isdigit())

    def save_config(self, text: str) -> None:
        replace_text(self.config, text)

    def are_kept(self, servers: ServersConfig) -> bool:
        """Whether the servers at the URLs are the launcher's, which end with the attempt: they ask for the run's own
        secret."""
        return servers.secret_file == str(self.secret)

    def lasting(self, config: Config, before: Config) -> Config:
        """A configuration as the next attempt is to find it: without the addresses of this one's servers, for which it
        has what stood there `before`."""
        servers, found = config.rollout.servers, before.rollout.servers
        if not self.are_kept(servers):
            return config
        own_nodes = config.cluster.engine_nodes > 0  # of whose servers rank 0 is told to start none itself
        kept = replace(
            servers,
            count=found.count if own_nodes else servers.count,
            urls=found.urls,
            host=found.host,
            secret_file=found.secret_file,
        )
        return replace(config, rollout=replace(config.rollout, servers=kept))


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, its folder too. Raises SpellError where the file system refuses."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_text(path, text)


class JsonLines:
    """A file of JSON objects, one a line, that survives a crash at any instant.

    `append` hands the line to the operating system (it outlives the process), `sync` to the disk
    (it outlives the machine). A line that a crash or a full disk cut short is taken away before
    the next one is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with writing(self.path):
            file = self._opened()
            end = file.tell()
            try:
                # A disk that is nearly full takes a part, and says why only when it is asked again.
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(end)
                raise

    def sync(self) -> None:
        if self._file is not None:
            with writing(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            try:
                self.sync()
            finally:
                self._file.close()
                self._file = None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 — closed by close()
            self._file.truncate(_whole_lines(self.path))
            self._file.seek(0, os.SEEK_END)
        return self._file


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file, packed or not; none where there is no file. One cut short is dropped with a
    warning."""
    if not path.is_file():
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a {type(row).__name__} where an object belongs")
            except (ValueError, RecursionError) as error:
                logger.warning("%s line %d is dropped: it is not whole (%s)", path, number, error)
                continue
            yield row


def _whole_lines(path: Path) -> int:
    """Bytes of the file up to the end of its last whole line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _TAIL)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0
