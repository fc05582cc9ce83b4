"""One call from a recipe to its end, on this machine or a cluster."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, Literal

from launchers import check, local, slurm
from launchers.job import PreparedRun, absolute, prepare
from launchers.machines import machines
from launchers.profile import PREFIX, Profile, ProfileError, list_profiles, load_profile
from spell_megatron.base.pulse import Pulse, lasting
from spell_megatron.base.terminal import Terminal
from spell_megatron.config import ClusterConfig, ConfigError, load_config, untrainable, written
from spell_megatron.config.yamltext import Plain, load_yaml
from spell_megatron.selfplay import prompts_of
from spell_megatron.types import SpellError

_INTERRUPTED = 130


def launch(
    recipe: str,
    overrides: Sequence[str] = (),
    executor: Literal["local", "slurm"] = "local",
    cluster: str = "",
    dryrun: bool = False,
) -> int:
    """Run a recipe to its end; returns the exit code of the job. A run on this machine takes this process' place.

    `overrides` are the recipe's `key=value`; `cluster.key=value` changes a key of the profile, where it has
    that key, and `cluster={…}` several. With `dryrun` the sbatch file (or the local command) is printed, without
    the values of its secrets, and nothing started; the run folder is there, and in it the file that works. Raises
    SpellError where the launch cannot work.
    """
    if executor not in ("local", "slurm"):
        raise ProfileError(f"no executor {executor!r}: give local or slurm")
    ours, recipes = _split(overrides) if cluster else ([], list(overrides))
    config = load_config(recipe, recipes)
    profile = _profile(executor, cluster, ours)
    on = machines(profile, config) if cluster else local.here(config)
    if executor == "local" and on.allocated > 1:
        raise ProfileError(
            f"{on.allocated} nodes, and this machine is one: --executor slurm, or cluster.nodes=1"
        )
    if fault := untrainable(config):
        raise ConfigError(fault)
    prompts_of(config)
    config = check.check_model(config, on, fetch=not dryrun)
    check.check_runs(config.runs)
    if executor == "local":
        return _local(prepare(config, profile, on), dryrun)
    check.check_nemo_run(absolute(config), profile)
    if not dryrun:
        check.check_environment(profile)
        slurm.require()
    return _slurm(prepare(config, profile, on), dryrun)


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the profile (without their prefix), and of the recipe, whose `cluster` has keys of its own."""
    overrides = [one for text in overrides for one in _unfolded(text)]
    recipes = {field.name for field in fields(ClusterConfig)} - {field.name for field in fields(Profile)}
    ours = [text for text in overrides if text.startswith(PREFIX) and _key(text) not in recipes]
    return [text.removeprefix(PREFIX) for text in ours], [text for text in overrides if text not in ours]


def _unfolded(override: str) -> list[str]:
    """`cluster={env: {X: 1}}` as the overrides `cluster.env.X=1`; any other one as it is."""
    key, _, value = override.partition("=")
    if key.strip() + "." != PREFIX:
        return [override]
    with suppress(ConfigError):  # whoever reads the whole override says what is wrong with it
        if isinstance(found := load_yaml(value), dict):
            return list(_leaves(found, PREFIX))
    return [override]


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value if isinstance(value, Plain) else written(value)}"


def _key(override: str) -> str:
    """The part of a key that follows the prefix."""
    return override.removeprefix(PREFIX).partition("=")[0].partition(".")[0]


def _profile(executor: str, cluster: str, overrides: list[str]) -> Profile:
    if cluster:
        return load_profile(cluster, overrides)
    if executor == "local":
        return Profile()
    raise ProfileError(
        f"--cluster PROFILE is missing; profiles: {', '.join(list_profiles())}, or the path of your own"
        " (docs/clusters.md)"
    )


def _local(job: PreparedRun, dryrun: bool) -> int:
    if dryrun:
        sys.stdout.write(shlex.join(local.command(job)) + "\n")
        return 0
    local.run(job)


def _slurm(job: PreparedRun, dryrun: bool) -> int:
    from launchers import nemo, script

    console = Terminal(stderr=True)
    text = nemo.write(job)
    if dryrun:
        sys.stdout.write(script.shown(text, job.profile.env))
        console.note(f"nothing is submitted; this file, with its secrets: {job.sbatch}")
        return 0
    slurm.check_accepted(job.sbatch)
    job_id = slurm.submit(job.sbatch)
    standing = f"job {job_id} is submitted"

    def note(text: str) -> None:
        nonlocal standing
        standing = text
        console.note(text)

    console.note(f"job {job_id} submitted; run folder {job.run}")
    try:
        with Pulse(lasting(lambda: standing), console):
            end = slurm.follow(job, job_id, sys.stdout, note)
    except KeyboardInterrupt:
        console.note(
            f"job {job_id} goes on without being watched: scancel {job_id} ends it; its logs: {job.logs}"
        )
        return _INTERRUPTED
    assert end.code is not None
    if end.code:
        said = "; ".join(slurm.failures(job, job_id)[-4:]) or f"its logs: {job.logs}"
        raise JobFailed(f"job {job_id} ended as {end.name.lower()}, exit code {end.code}: {said}", end.code)
    return 0


class JobFailed(SpellError):
    """A job that was submitted and did not end well; `exit_code` is its own."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code
