"""What can be known to fail before anything is submitted, each with its remedy."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path

from launchers import script
from launchers.job import read_by
from launchers.machines import Machines
from launchers.profile import Profile
from spell_megatron.config import Config
from spell_megatron.policy.layout import LayoutError, check_policy
from spell_megatron.types import SpellError
from spell_megatron.weights.contents import shape_of
from spell_megatron.weights.locate import model_folder


def check_model(config: Config, on: Machines, *, fetch: bool) -> Config:
    """The configuration with its model at hand: with `fetch`, one of the hub is downloaded first.

    Raises SpellError where there is no model folder, or the layout does not fit it and the ranks.
    """
    path = config.model.path
    if fetch or not _on_hub(path):
        folder = model_folder(path).resolve()
        config = replace(config, model=replace(config.model, path=str(folder)))
    else:
        from spell_megatron.tools.plan.catalogue import architecture  # its room needs torch and megatron-core

        folder = architecture(path)
    shape = shape_of(folder, config.model.families)
    try:
        check_policy(config.policy, shape, on.world_size)
    except LayoutError as error:
        raise LayoutError(
            f"{error}\n  ({on.nodes} nodes x {on.ranks} ranks; change policy.layout of the recipe, or"
            " cluster.nodes and cluster.gpus_per_node)"
        ) from None
    return config


def check_runs(runs: str) -> None:
    """Raise SpellError where no run folder can be made in `runs`."""
    folder = Path(runs).expanduser().resolve()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "is no folder" if not above.is_dir() else "cannot be written"
        raise SpellError(
            f"no run folder can be made in {folder}: {above} {what}; choose a folder that all nodes share,"
            " with runs=…"
        )


def check_nemo_run(config: Config, profile: Profile) -> None:
    """Raise SpellError where nemo-run cannot be used, or not for a run of this absolute configuration."""
    try:
        nemo = importlib.import_module("launchers.nemo")
    except ImportError as error:
        raise SpellError(
            f"--executor slurm needs nemo-run, which does not import ({error}):"
            " pip install --no-deps -r requirements/launch.lock"
        ) from None
    folder = Path(config.runs) / config.name
    mounted = script.unmounted(profile, (folder, *read_by(config))) if profile.container else []
    if faults := nemo.refusals(folder, mounted):
        raise SpellError("; ".join(faults))


def check_environment(profile: Profile) -> None:
    """Raise SpellError where the profile's virtual environment is not one."""
    if profile.venv and not (Path(profile.venv) / "bin" / "activate").is_file():
        raise SpellError(
            f"venv: {profile.venv} is no virtual environment (no bin/activate); correct the profile"
        )


def _on_hub(path: str) -> bool:
    return path.count("/") == 1 and not Path(path).expanduser().exists()
