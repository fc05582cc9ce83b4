"""Cluster profiles: what a SLURM cluster wants to be told, in one small YAML file a cluster.

`load_profile("h100", ["nodes=8"])` reads `h100.yaml` from the user's folder or from the shipped examples, and
applies overrides. An unknown key, a wrong type or a contradiction raises `ProfileError`. Values are read as those
of recipes are: by the type of their key.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from spell_megatron.base.secret import is_secret
from spell_megatron.config import ConfigError, Location
from spell_megatron.config.explaining import nearest
from spell_megatron.config.reading import at_home, build, override
from spell_megatron.config.yamltext import read_mapping

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
PREFIX = "cluster."
"""Prefix of a profile's keys on the command line."""
SHIPPED = Path(__file__).parent / "clusters"
OWN = Path("~/.config/spell-megatron/clusters")

_TIME = re.compile(
    r"(\d+-\d{1,2}(:\d{2}){0,2}|\d{1,3}(:\d{2}){1,2})"
)  # what sbatch calls time, but bare minutes
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEADER = re.compile(r"[a-z][a-z0-9-]*")
_ASKS_FOR_GPUS = re.compile(r"gpus-per-|(gres|tres-per-task)=.*gpu")

_COMMAND = r"\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`"
_ASSIGNED = re.compile(
    r"""(?<![^\s;&|({])(?P<quote>["'])?(?P<name>[A-Za-z_]\w*)\+?="""
    r"""(?P<value>(?(quote)(?:\\.|(?!(?P=quote)).)+"""
    rf"""|(?:'[^']*'|"(?:\\.|[^"\\])*"|\$\{{[^}}]*\}}|{_COMMAND}|\\.|[^\s;&|()'"`\\])+))""",
    re.DOTALL,
)
"""A word of bash that sets a variable, `NAME=value` or `"NAME=value"`."""
_READ = re.compile(rf"""("?)(\$\w+|\$\{{\w+\}}|{_COMMAND})\1""", re.DOTALL)
"""A value that stands elsewhere: in a variable, or where a command finds it."""

_HEADERS: Mapping[str, str] = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "time": "time",
    "nodes": "nodes",
    "ntasks": "ranks_per_node",
    "ntasks-per-node": "ranks_per_node",
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_rank",
    "mem": "memory",
    "exclusive": "exclusive",
    "signal": "warn_seconds",
    "requeue": "crash_retries",
    "no-requeue": "crash_retries",
    "export": "env",
    "export-file": "env",
    "job-name": "name of the recipe",
    "array": "",
    "output": "",
    "error": "",
    "input": "",
    "open-mode": "",
    "wait": "",
    "wrap": "",
}
"""Headers that the launcher writes or relies on, and the key that decides each, if one does."""
_VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "ENGINE_PORT", "ENGINES", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
"""Variables that the launcher sets."""


class ProfileError(ConfigError):
    """A cluster profile, or a use of one, that is wrong."""


@dataclass(frozen=True, config=_STRICT)
class Profile:
    """One cluster, as one user uses it."""

    nodes: int | None = Field(default=None, gt=0)
    """Nodes of the trainer; the recipe's `cluster.nodes` where not given. The same holds for the next two."""
    engine_nodes: int | None = Field(default=None, ge=0)
    """Nodes, besides, that hold vLLM servers and nothing else."""
    gpus_per_node: int | None = Field(default=None, ge=0)
    """0 on a cluster without GPUs."""
    request_gpus: bool = True
    """Ask SLURM for them by `--gpus-per-node`. Where it counts GPUs otherwise, `false`: ask in `sbatch`, {gres: gpu:8},
    or not at all."""
    ranks_per_node: int | None = Field(default=None, gt=0)
    """Training processes on each node; one a GPU where not given."""
    account: str = ""
    partition: str = ""
    qos: str = ""
    time: str = "04:00:00"
    """Limit of one attempt, as sbatch writes it: HH:MM:SS or D-HH:MM:SS. A run may take many attempts."""
    warn_seconds: int = Field(default=600, ge=0)
    """So long before the limit the run is told to save itself and go back to the queue; 0 never tells it."""
    crash_retries: int = Field(default=1, ge=0)
    """How often a crashed run is started again from the same checkpoint."""
    cpus_per_rank: int | None = Field(default=None, gt=0)
    memory: str = ""
    """Memory of a node, such as 500G; "0" is all of it."""
    exclusive: bool = False
    sbatch: dict[str, str] = Field(default_factory=dict)
    """Any other sbatch headers, by their long names: {constraint: h100, reservation: night}; `true` for one without a
    value."""
    venv: Location = ""
    """A virtual environment on the shared file system; the launching Python's own where neither is given."""
    container: Location = ""
    """An image for pyxis, instead of a virtual environment: the path of a squashfs file, or REGISTRY#IMAGE:TAG."""
    mounts: tuple[Location, ...] = ()
    """Folders of the host that a container sees, `source:target`. Run, model and corpus come by themselves."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every rank."""
    setup: tuple[str, ...] = ()
    """Lines of bash for the first node, before the ranks start: `module load cuda`."""


def load_profile(name: str, overrides: Iterable[str] = ()) -> Profile:
    """Read a profile (a name or a path), apply `key=value` overrides, validate."""
    invalid = f"{name} is not a valid cluster profile"
    try:
        file = _find(name)
        values = read_mapping(file, "cluster profile")
        held = _secrets(values)
        for text in overrides:
            override(Profile, values, text, PREFIX)
        _check_secrets(file, held, _secrets(values))
        profile = build(Profile, values, invalid)
    except ConfigError as error:
        raise ProfileError(str(error)) from None
    if faults := list(_contradictions(profile)):
        raise ProfileError(f"{invalid}:\n" + "\n".join(f"  {fault}" for fault in faults))
    return profile


def list_profiles() -> list[str]:
    """Names of the profiles that `load_profile` finds, the user's own first."""
    own = sorted(path.stem for folder in _own() for path in folder.glob("*.yaml"))
    return own + [path.stem for path in sorted(SHIPPED.glob("*.yaml")) if path.stem not in own]


def _own() -> list[Path]:
    """The user's folder of profiles; none where nobody knows the user's home."""
    try:
        return [Path(at_home(str(OWN)))]
    except ConfigError:
        return []


def _find(name: str) -> Path:
    for path in (*(folder / f"{name}.yaml" for folder in (*_own(), SHIPPED)), Path(at_home(name))):
        if path.is_file():
            return path
    known = list_profiles()
    raise ConfigError(
        f"no cluster profile {name!r}{nearest(name, known)}; profiles: {', '.join(known)}. Give a path, or write your"
        f" cluster's into {OWN}/{Path(name).stem}.yaml (docs/clusters.md)"
    )


def bash_secrets(text: str) -> Iterator[re.Match[str]]:
    """Where bash sets a variable to what is nobody else's to read: `name` and `value` of each match."""
    for found in _ASSIGNED.finditer(text):
        read = found["quote"] != "'" and _READ.fullmatch(found["value"])
        if not read and is_secret(found["name"], found["value"]):
            yield found


def _secrets(values: Mapping[str, Any]) -> set[tuple[str, str, str]]:
    """Secrets of a profile: the key that each stands in, its name, its value."""
    env, setup = values.get("env"), values.get("setup")
    found = set[tuple[str, str, str]]()
    if isinstance(env, dict):
        found |= {("env", name, str(value)) for name, value in env.items() if is_secret(name, value)}
    if isinstance(setup, list):
        found |= {("setup", one["name"], one["value"]) for one in bash_secrets("\n".join(map(str, setup)))}
    return found


def _check_secrets(
    file: Path, held: set[tuple[str, str, str]], all_of_them: set[tuple[str, str, str]]
) -> None:
    """Raise ProfileError where a secret came by the command line, or stands in a file that others can read."""
    for key, name, _ in sorted(all_of_them - held):
        raise ProfileError(
            f"cluster.{key}: {name} on a command line can be read by everybody on this machine: `export {name}=…`"
            " before you launch (a job takes the environment along), or write it into a profile of your own"
        )
    if held and stat.S_IMODE(file.stat().st_mode) & 0o077:
        names = ", ".join(sorted({name for _, name, _ in held}))
        raise ProfileError(f"{file} holds secrets ({names}) and others can read it: chmod 600 {file}")


def _seconds(time: str) -> int:
    """Of a time limit as sbatch reads it: D-HH[:MM[:SS]], HH:MM:SS or MM:SS."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    parts = [*parts, 0, 0][:3] if dash else [0, 0, *parts][-3:]
    return ((int(days or 0) * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]


def _contradictions(profile: Profile) -> Iterable[str]:
    if not _TIME.fullmatch(profile.time):
        yield f"time: {profile.time!r} is no time limit; write HH:MM:SS or D-HH:MM:SS"
    elif profile.warn_seconds >= (seconds := _seconds(profile.time)):
        yield (
            f"warn_seconds: an attempt of {seconds} s (time) would be told to save itself {profile.warn_seconds} s"
            " before its end, and never make a step: lower it, or raise time"
        )
    if profile.venv and profile.container:
        yield "venv and container exclude each other: keep one"
    if (image := profile.container) and not image.startswith("/") and "#" not in image:
        yield (
            f"container: pyxis would fetch {image!r} from the public registry; write the image's whole path,"
            " /shared/images/NAME.sqsh, or REGISTRY#IMAGE:TAG"
        )
    for name in profile.env:
        if not _NAME.fullmatch(name):
            yield f"env: {name!r} is no name of an environment variable; write env: {{NAME: value}}"
        if name in _VARIABLES or name.startswith("SLURM_"):
            yield f"env: {name} is set for each rank by the launcher: leave it out"
    for mount in profile.mounts:
        if not all(part.startswith("/") for part in mount.split(":")[:2]):
            yield f"mounts: {mount!r} is not source:target with absolute paths, as /data:/data"
    for header, value in profile.sbatch.items():
        if not _HEADER.fullmatch(header):
            yield f"sbatch: {header!r} is no long option of sbatch (without dashes in front), as constraint"
        elif owned := next((name for name in _HEADERS if name.startswith(header)), ""):
            key = _HEADERS[owned]
            yield f"sbatch: {header} is the launcher's own: " + (f"set {key}" if key else "leave it out")
        elif profile.gpus_per_node == 0 and _ASKS_FOR_GPUS.match(asked := f"{header}={value}"):
            yield (
                f"sbatch: {asked} asks for GPUs, and by gpus_per_node: 0 a node has none: set gpus_per_node to their"
                " number, and request_gpus: false"
            )
