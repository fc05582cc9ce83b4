"""Cluster profiles: what a SLURM cluster wants to be told, in one small YAML file a cluster.

`load_profile("h100", ["nodes=8"])` reads `h100.yaml` from the user's folder or from the shipped examples, and
applies overrides. An unknown key, a wrong type or a contradiction raises `ProfileError`.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from spell_megatron.config import names_secret
from spell_megatron.types import SpellError

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)
SHIPPED = Path(__file__).parent / "clusters"
OWN = Path("~/.config/spell-megatron/clusters")

_TIME = re.compile(
    r"(\d+-\d{1,2}(:\d{2}){0,2}|\d{1,3}(:\d{2}){1,2})"
)  # what sbatch calls time, but bare minutes
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEADER = re.compile(r"[a-z][a-z0-9-]*")


class ProfileError(SpellError):
    exit_code = 2


@dataclass(frozen=True, config=_STRICT)
class Profile:
    """One cluster, as one user uses it."""

    nodes: int | None = Field(default=None, gt=0)
    """Nodes of the trainer; the recipe's `cluster.nodes` where not given. The same holds for the next two."""
    engine_nodes: int | None = Field(default=None, ge=0)
    """Nodes, besides, that hold vLLM servers and nothing else."""
    gpus_per_node: int | None = Field(default=None, ge=0)
    """0 on a cluster without GPUs."""
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
    """Of a node, such as 500G; "0" is all of it."""
    exclusive: bool = False
    sbatch: dict[str, str] = Field(default_factory=dict)
    """Any other sbatch headers, by their long names: {constraint: h100, reservation: night}."""
    venv: str = ""
    """A virtual environment on the shared file system; the launching Python's own where neither is given."""
    container: str = ""
    """An image for pyxis, instead of a virtual environment."""
    mounts: tuple[str, ...] = ()
    """Folders of the host that a container sees, `source:target`. Run, model and corpus come by themselves."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every rank."""
    setup: tuple[str, ...] = ()
    """Lines of bash for the first node, before the ranks start: `module load cuda`."""


_ADAPTER = TypeAdapter(Profile)


def load_profile(name: str, overrides: Iterable[str] = ()) -> Profile:
    """Read a profile (a name or a path), apply `key=value` overrides, validate."""
    file = _find(name)
    values = _read(file)
    held = _secrets(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ProfileError(
                f"an override of a profile is cluster.key=value, found {'cluster.' + override!r}"
            )
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ProfileError(f"cluster.{override}: the value is not YAML: {error}") from None
    _check_secrets(file, held, _secrets(values))
    try:
        profile = _ADAPTER.validate_python(values)
    except ValidationError as error:
        faults = [_explain(e["loc"], e["type"], e["msg"]) for e in error.errors()]
    else:
        faults = list(_contradictions(profile))
        if not faults:
            return profile
    raise ProfileError(
        f"{name} is not a valid cluster profile:\n" + "\n".join(f"  {fault}" for fault in faults)
    )


def list_profiles() -> list[str]:
    """Names of the profiles that `load_profile` finds, the user's own first."""
    own = sorted(path.stem for path in OWN.expanduser().glob("*.yaml"))
    return own + [path.stem for path in sorted(SHIPPED.glob("*.yaml")) if path.stem not in own]


def _find(name: str) -> Path:
    for path in (OWN.expanduser() / f"{name}.yaml", SHIPPED / f"{name}.yaml", Path(name).expanduser()):
        if path.is_file():
            return path
    known = list_profiles()
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ProfileError(
        f"no cluster profile {name!r}{hint}; profiles: {', '.join(known)}. Give a path, or write your"
        f" cluster's into {OWN}/{Path(name).stem}.yaml (docs/clusters.md)"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"cannot read the cluster profile {path}: {error}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"{path}: a profile is a mapping of keys, found {type(values).__name__}")
    return values


def _secrets(values: dict[str, Any]) -> set[str]:
    """Names of secrets in a profile's `env`."""
    env = values.get("env")
    dotted = {key.removeprefix("env.") for key in values if str(key).startswith("env.")}
    return {
        str(name) for name in {*dotted, *(env if isinstance(env, dict) else ())} if names_secret(str(name))
    }


def _check_secrets(file: Path, held: set[str], all_of_them: set[str]) -> None:
    """Raise ProfileError where a secret came by the command line, or stands in a file that others can read."""
    for name in sorted(all_of_them - held):
        raise ProfileError(
            f"cluster.env: {name} on a command line can be read by everybody on this machine: `export {name}=…`"
            " before you launch (a job takes the environment along), or write it into a profile of your own"
        )
    if held and stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ProfileError(
            f"{file} holds secrets ({', '.join(sorted(held))}) and others can read it: chmod 600 {file}"
        )


def _contradictions(profile: Profile) -> Iterable[str]:
    if not _TIME.fullmatch(profile.time):
        yield f'time: {profile.time!r} is no time limit; write "HH:MM:SS" or "D-HH:MM:SS", in quotes'
    if profile.venv and profile.container:
        yield "venv and container exclude each other: keep one"
    for name in profile.env:
        if not _NAME.fullmatch(name):
            yield f"env: {name!r} is no name of an environment variable"
    for mount in profile.mounts:
        if not all(part.startswith("/") for part in mount.split(":")[:2]):
            yield f"mounts: {mount!r} is not source:target with absolute paths"
    for header in profile.sbatch:
        if not _HEADER.fullmatch(header):
            yield f"sbatch: {header!r} is no long option of sbatch (without dashes in front)"


def _explain(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(map(str, loc))
    if kind == "unexpected_keyword_argument":
        close = difflib.get_close_matches(key, [field.name for field in fields(Profile)], n=1, cutoff=0.5)
        return f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    return f"{key}: {message[0].lower()}{message[1:]}"
