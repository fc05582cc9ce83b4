"""Conversions on request: a Hugging Face folder to a Megatron checkpoint, and back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import torch
import torch.distributed as dist

from spell_megatron.base.files import hf_config, weights_dtype
from spell_megatron.base.outputs import check_output, publish, stage
from spell_megatron.config import Dtype, PolicyConfig, load_config
from spell_megatron.policy.agreement import agreed
from spell_megatron.policy.checkpoint import Checkpoints, load_policy, open_checkpoint
from spell_megatron.policy.learner import HeldPolicy
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.types import SpellError
from spell_megatron.weights.locate import model_folder


def import_hf(folder: Path, out: Path, families: Sequence[str] = ()) -> None:
    """Write a model folder as `out/checkpoints/step-00000`, in the folder's own precision.

    Raises SpellError where `out` is not empty and no earlier import, as a run's folder is.
    """
    check_output(out, "import")
    dtype = weights_dtype(hf_config(folder)) or "float32"
    if dtype not in get_args(Dtype):
        raise SpellError(f"{folder} holds {dtype} weights; convert them to bfloat16 or float32 first")
    with _held(cast(Dtype, dtype), folder, families) as policy:
        made = {"model": str(folder.resolve()), "dtype": dtype, "families": list(families)}
        main, group = policy.world.is_main, dist.group.WORLD if policy.world.size > 1 else None
        staged = agreed(stage(out) if main else Path(), group)
        try:
            Checkpoints(staged / "checkpoints").save(0, policy, made)
            if main:
                publish(staged, out, "import")
        finally:
            if main:
                shutil.rmtree(staged, ignore_errors=True)  # where it has not got its name


def export_hf(source: Path, out: Path) -> None:
    """Write the policy of a run, or of one of its checkpoints, as a model folder.

    Raises SpellError where `out` is not empty and no earlier model of ours.
    """
    check_output(out, "model")
    checkpoint = open_checkpoint(source)
    if "model" in checkpoint.run:  # made by import_hf
        dtype, folder = checkpoint.run["dtype"], Path(checkpoint.run["model"])
        families = checkpoint.run.get("families", ())
    else:
        config = load_config(str(checkpoint.path.parent.parent / "config.yaml"))
        dtype, folder = config.policy.dtype, model_folder(config.model.path)
        families = config.model.families
    with _held(dtype, folder, families) as policy:
        load_policy(policy, checkpoint)
        policy.save_hf(out)


@contextmanager
def _held(dtype: Dtype, folder: Path, families: Sequence[str]) -> Iterator[HeldPolicy]:
    """A policy whose weights are in host memory, on a machine with a GPU, too: nothing is computed with them."""
    settings = PolicyConfig(dtype=dtype, spec="torch")
    world = start_world(settings.layout, seed=0, timeout_seconds=settings.timeout_seconds)
    try:
        with _on_host():
            policy = HeldPolicy(
                settings, folder, replace(world, device=torch.device("cpu")), families=families
            )
        yield policy
    finally:
        stop_world()


@contextmanager
def _on_host() -> Iterator[None]:
    """Have models be built in host memory; megatron-core builds them where it is told that the GPU is."""
    device, torch.cuda.current_device = torch.cuda.current_device, lambda: torch.device("cpu")  # type: ignore
    try:
        yield
    finally:
        torch.cuda.current_device = device
