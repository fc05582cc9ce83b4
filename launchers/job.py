"""What a launch comes to before any executor sees it: a run folder, and the commands that run in it.

The run folder is made, with its whole configuration, by the launcher and not by the job. Every attempt of the
job then is the same command, `resume RUN`, which starts from nothing where there is no checkpoint yet; all
ranks agree on the folder; and a recipe that is edited meanwhile changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launchers.machines import Machines, recorded
from launchers.profile import Profile
from spell_megatron.base.files import home_of_links
from spell_megatron.base.ownership import private
from spell_megatron.base.secret import write_secret
from spell_megatron.config import Config, dump_config
from spell_megatron.corpus.worlds import WORLDS
from spell_megatron.run.record.folder import RunFolder
from spell_megatron.selfplay.prompts import STYLES

COMMAND = ("-m", "spell_megatron.tools.cli")
TRAINER = (*COMMAND, "resume")
ENGINES = ("-m", "launchers.engines")
REQUEUED = "requeued-"
"""Begins the name of an empty file in `logs`, one for each attempt that sent itself back to the queue."""


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A prepared run. `needs` are the folders outside the run's that its ranks read."""

    run: Path
    profile: Profile
    machines: Machines
    needs: tuple[Path, ...] = ()
    trainer: tuple[str, ...] = TRAINER
    """Arguments of Python before the run folder, for each rank."""
    engines: tuple[str, ...] = ENGINES
    """The same, for each node whose servers the launcher starts."""

    @property
    def logs(self) -> Path:
        return self.run / "logs"

    @property
    def secret(self) -> Path:
        """A file with what every request to the job's servers must carry, and its ranks know each other by."""
        return RunFolder(self.run).secret

    @property
    def sbatch(self) -> Path:
        return self.run / "job.sbatch"

    @property
    def name(self) -> str:
        return self.run.name


def prepare(config: Config, profile: Profile, on: Machines) -> PreparedRun:
    """Make the run folder of a configuration. Raises SpellError where it cannot be written."""
    config = absolute(recorded(config, on))
    with private(config.record.group_readable):
        folder = RunFolder.create(config.runs, config.name)
        folder.save_config(dump_config(config))
        job = PreparedRun(folder.path, profile, on, tuple(read_by(config)), TRAINER, ENGINES)
        job.logs.mkdir()
        write_secret(job.secret)
    return job


def absolute(config: Config) -> Config:
    """The configuration with every path made absolute: a job's ranks start elsewhere.

    What names no file here (a hub id, `toy`) stays as it is.
    """
    prompts = config.model.prompts if config.model.prompts in STYLES else _absolute(config.model.prompts)
    corpus, heldout, servers = config.corpus, config.heldout, config.rollout.servers
    sources = tuple(replace(source, path=_absolute(source.path)) for source in corpus.sources)
    benchmarks = tuple(map(_absolute, corpus.benchmarks))
    secret = _absolute(servers.secret_file)
    return replace(
        config,
        runs=str(Path(config.runs).expanduser().resolve()),
        model=replace(config.model, path=_absolute(config.model.path), prompts=prompts),
        corpus=replace(corpus, sources=sources, benchmarks=benchmarks),
        heldout=replace(heldout, path=_absolute(heldout.path), data=_absolute(heldout.data)),
        rollout=replace(config.rollout, servers=replace(servers, secret_file=secret)),
    )


def read_by(config: Config) -> list[Path]:
    """Folders that a run of an absolute configuration reads; of a snapshot of the hub's, all that it links to."""
    named = (
        config.model.path,
        config.model.prompts,
        config.heldout.path,
        config.heldout.data,
        config.rollout.servers.secret_file,
        *config.corpus.benchmarks,
        *(source.path for source in config.corpus.sources),
    )
    found = [folder for name in named if Path(name).is_absolute() for folder in _holding(Path(name))]
    return list(dict.fromkeys(found))


def _holding(path: Path) -> Iterator[Path]:
    """The folders that a path needs: a file may be a link to one of another folder."""
    yield (home := home_of_links(path if path.is_dir() else path.parent))
    if not (there := path.resolve()).is_relative_to(home):
        yield there.parent


def _absolute(name: str) -> str:
    """A file keeps its own name, whose ending says what it holds; a link's target may have none."""
    path = Path(name).expanduser()
    if not name or name in WORLDS or not path.exists():
        return name
    return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)
