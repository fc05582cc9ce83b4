"""What ranks tell each other, as Python objects: rank 0's word, and the words of all.

Whatever waits for rank 0 needs no more of Megatron than this: nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch.distributed as dist

from spell_megatron.types import SpellError

if TYPE_CHECKING:
    from spell_megatron.policy.world import World

Value = TypeVar("Value")
Group: TypeAlias = "dist.ProcessGroup | None"
"""Ranks that agree on something; None where there is one process."""


def agreed(value: Value, group: Group) -> Value:
    """Rank 0's value, on every rank."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gathered(value: Value, group: Group) -> list[Value]:
    """The values of all ranks on rank 0, nothing elsewhere."""
    if group is None:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


def share(work: Callable[[], Value], world: World) -> Value:
    """What rank 0 makes of `work`, on every rank of the world. Where it raises there, the others raise SpellError."""
    if world.size == 1:
        return work()
    result, fault = None, ""
    try:
        result = work() if world.is_main else None
    except BaseException as error:
        fault = type(error).__name__
        raise
    finally:
        result, fault = agreed((result, fault), dist.group.WORLD)
    if fault:
        raise SpellError(f"rank 0 has given up ({fault}); its own message says why")
    return cast("Value", result)
