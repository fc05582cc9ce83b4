"""What this rank holds of the optimizer: for each parameter a run of it, with its master copy and moments.

A distributed optimizer holds other runs on every data-parallel rank, any other the whole parameter on each. The tensors
are the optimizer's own: what is copied into them is its state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor

Values = dict[Any, Any]


@dataclass(frozen=True, slots=True)
class Share:
    """The state of elements `start` to `stop` of a parameter, flattened, in the optimizer `owner`.

    `state` is empty where the optimizer never stepped.
    """

    owner: Any
    parameter: Tensor
    start: int
    stop: int
    state: dict[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is to be saved, by megatron-core's names. In float32 the weights are their own master copy."""
        weights = self.parameter.untyped_storage()._cdata
        for name, tensor in self.state.items():
            if name != "step" and tensor.untyped_storage()._cdata != weights:
                yield name, tensor.detach()


def shares(optimizer: Any, *, fresh: bool) -> Iterator[Share]:
    """The share of every parameter of which this rank holds anything."""
    for leaf in _leaves(optimizer):
        if isinstance(leaf, DistributedOptimizer):
            for parameter, run in _owned(leaf):
                state = {} if fresh else leaf._get_main_param_and_optimizer_states(parameter)
                yield Share(leaf, parameter, run.start, run.end, state)
        else:
            for parameter, main in _copies(leaf):
                state = {} if fresh else {"param": main, **leaf.optimizer.state[main]}
                yield Share(leaf, parameter, 0, parameter.numel(), state)


_CONFIGURED = ("max_lr", "min_lr", "start_wd", "end_wd")
"""What the configuration says of a group of parameters. Newer releases of megatron-core tell groups apart by it."""


def plain_values(optimizer: Any) -> Values:
    """What is no tensor: rates and steps of the groups of parameters. The same on every rank."""
    leaves = _leaves(optimizer)
    found = [
        leaf.state_dict() if isinstance(leaf, DistributedOptimizer) else _groups(leaf) for leaf in leaves
    ]
    return found[0] if len(found) == 1 else dict(enumerate(found))


def prepare(optimizer: Any, values: Values) -> None:
    """Take over the plain values, and make the tensors of an optimizer that never stepped."""
    leaves = _leaves(optimizer)
    for number, leaf in enumerate(leaves):
        saved: Values = values if len(leaves) == 1 else values[number]
        saved = saved.get("optimizer", saved)
        groups = saved["param_groups"]
        if "common_step" in saved.get("state", {}):  # as megatron-core writes what is not sharded
            groups = [{**group, "step": float(saved["state"]["common_step"])} for group in groups]
        own = {key: leaf.param_groups[0][key] for key in _CONFIGURED if key in leaf.param_groups[0]}
        groups = [{k: v for k, v in group.items() if k not in _CONFIGURED} | own for group in groups]
        if isinstance(leaf, DistributedOptimizer):
            leaf.load_state_dict({"optimizer": {"param_groups": groups}})
        else:
            _prepare(leaf, groups)


@torch.no_grad()
def settle(found: Iterable[Share]) -> None:
    """Tell the optimizers that the state of their shares has been written to."""
    offloaded = {}
    for share in found:
        if isinstance(share.owner, DistributedOptimizer):
            share.owner._set_main_param_and_optimizer_states(share.parameter, share.state)
            if hasattr(share.owner.optimizer, "_sync_hdo_state_to_sub_optimizers"):
                offloaded[id(share.owner)] = share.owner.optimizer
    for optimizer in offloaded.values():
        optimizer._sync_hdo_state_to_sub_optimizers()


def _leaves(optimizer: Any) -> list[Any]:
    """Megatron's optimizers of the dense and of the expert parameters."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _owned(leaf: Any) -> Iterator[tuple[Tensor, Any]]:
    """Each parameter of a distributed optimizer with this rank's run of it."""
    for ranges in leaf.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                yield from ((parameter, runs["param"]) for parameter, runs in bucket["param_map"].items())


def _copies(leaf: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter with what the optimizer works on: in bfloat16 a copy, which Megatron attaches to it."""
    if hasattr(leaf, "float16_groups"):
        for parameters, mains in zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True):
            yield from zip(parameters, mains, strict=True)
        for parameters in leaf.fp32_from_fp32_groups:
            yield from ((parameter, parameter) for parameter in parameters)
    else:
        yield from ((p, p) for group in leaf.optimizer.param_groups for p in group["params"])


def _groups(leaf: Any) -> Values:
    """As a distributed optimizer says it: the step stands in every group."""
    inner = leaf.optimizer
    steps = [float(state["step"]) for state in inner.state.values() if "step" in state]
    step = {"step": steps[0]} if steps else {}
    groups = [{**step, **{k: v for k, v in group.items() if k != "params"}} for group in inner.param_groups]
    return {"optimizer": {"param_groups": groups}}


def _prepare(leaf: Any, saved: list[Values]) -> None:
    inner = leaf.optimizer
    leaf.init_state_fn(inner, leaf.config)
    in_states = isinstance(inner, torch.optim.Adam)  # a step of its own for every parameter
    for group in inner.param_groups:
        match = next(other for other in saved if _kind(other) == _kind(group))
        group.update({k: v for k, v in match.items() if k != "params" and not (in_states and k == "step")})
        for parameter in group["params"] if in_states else ():
            inner.state[parameter]["step"] = torch.tensor(float(match["step"]))


def _kind(group: Values) -> list[Any]:
    return [group.get(key) for key in param_group_identifier_keys]
