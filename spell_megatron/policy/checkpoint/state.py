"""A learner's state as checkpoints know it: the parts of its tensors on this rank, and what is no tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from spell_megatron.base.terminal import said
from spell_megatron.policy.agreement import Value
from spell_megatron.policy.checkpoint.faults import reason
from spell_megatron.policy.checkpoint.files import read_bytes
from spell_megatron.policy.checkpoint.folder import Checkpoint
from spell_megatron.policy.checkpoint.index import read_index
from spell_megatron.policy.checkpoint.parts import TensorPart, loaded_parts, saved_parts
from spell_megatron.policy.checkpoint.read import load_plain, read_parts
from spell_megatron.policy.checkpoint.shares import Share, plain_values, prepare, settle, shares
from spell_megatron.policy.learner import HeldPolicy, Learner
from spell_megatron.types import SpellError

VALUES = "common.pt"
_LARGEST_VALUES = 1 << 28


def learner_state(learner: HeldPolicy) -> tuple[list[TensorPart], dict[str, Any]]:
    """What this rank saves of the tensors, and the plain values, which are the same on every rank.

    Before its first step an optimizer has no state. A policy that nothing trains is saved as one that has not begun.
    """
    values: dict[str, Any] = {"schedule": {"num_steps": 0}, "rng": torch.get_rng_state()}
    held = list[Share]()
    if isinstance(learner, Learner):
        fresh = learner.schedule.num_steps == 0
        values["schedule"] = learner.schedule.state_dict()
        if not fresh:
            values["optimizer"] = plain_values(learner.optimizer)
        held = list(shares(learner.optimizer, fresh=fresh))
    return saved_parts(learner, held), values


def load_learner(learner: Learner, checkpoint: Checkpoint) -> int:
    """Take over the state of a checkpoint in this learner's own layout; the bytes that this rank read. A collective.

    Raises SpellError, on every rank, where it is another model's, cannot be read, or holds more than tensors and
    plain values.
    """
    learner.settle()

    def take() -> tuple[dict[str, Any], bool, int]:
        values = _read_values(checkpoint.learner)
        fresh = "optimizer" not in values
        if not fresh:
            prepare(learner.optimizer, values["optimizer"])
        held = list(shares(learner.optimizer, fresh=fresh))
        read = read_parts(checkpoint.learner, read_index(checkpoint.learner), loaded_parts(learner, held))
        settle(held if not fresh else ())
        return values, fresh, read

    values, fresh, read = _together(take, checkpoint, learner.world.size)
    if learner.policy.optimizer.distributed:
        for model in learner.models:
            model.start_param_sync(force_sync=True)
    if fresh:
        learner.optimizer.reload_model_params()
    adam = learner.policy.optimizer
    for group in learner.optimizer.param_groups:  # they are restored with the rates of the checkpoint
        group.update(max_lr=learner.schedule.max_lr, min_lr=learner.schedule.min_lr)
        group.update(betas=adam.betas, eps=adam.eps)
    learner.schedule.load_state_dict({**learner.schedule.state_dict(), **values["schedule"]})
    torch.set_rng_state(values["rng"])
    return read


def load_policy(policy: HeldPolicy, checkpoint: Checkpoint) -> int:
    """Take over the weights of a checkpoint, and read nothing else; the bytes that this rank read. A collective.

    Raises as `load_learner`.
    """
    folder = checkpoint.learner
    return _together(
        lambda: read_parts(folder, read_index(folder), loaded_parts(policy, ())),
        checkpoint,
        policy.world.size,
    )


def _together(take: Callable[[], Value], checkpoint: Checkpoint, ranks: int) -> Value:
    """What `take` takes over from a checkpoint on this rank. Raises SpellError on every rank where any cannot."""
    value, fault = None, ""
    try:
        value = take()
    except SpellError as error:
        fault = str(error)
    except Exception as error:
        fault = f"the checkpoint {checkpoint.path} cannot be taken over: {reason(error)}"
    faults: list[Any] = [None] * ranks
    dist.all_gather_object(faults, fault)
    if fault := next(filter(None, faults), ""):
        raise SpellError(fault)
    return cast("Value", value)


def _read_values(folder: Path) -> dict[str, Any]:
    """What of a state is no tensor. Raises SpellError where it is more than tensors and plain values."""
    path = folder / VALUES
    try:
        values: dict[str, Any] = load_plain(read_bytes(path, _LARGEST_VALUES), _LARGEST_VALUES)
        if not isinstance(values["schedule"]["num_steps"], int):
            raise TypeError("it has no number of steps")
    except OSError:
        raise
    except Exception as error:  # an unpickler raises whatever a hostile stream makes of it
        raise SpellError(f"{path} holds no plain values ({said(error)[:200]}): nothing was read") from None
    return values
