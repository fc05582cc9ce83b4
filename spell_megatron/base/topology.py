"""Which GPUs the trainer computes on, which the engines, and what follows from that. No torch.

Everybody who needs to know asks `topology`: the trainer, its fleet, the launchers and the planner. Two things follow
from the GPUs that are used, and from nothing else. Where both use the same ones they take turns in their memory
(`colocated`). And weights travel within a device there, since NCCL takes no two ranks on one GPU; elsewhere they
travel between devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from spell_megatron.config import Config, ConfigError

Transfer = Literal["gloo", "nccl", "ipc", "shm"]
LOCAL: tuple[Transfer, ...] = ("ipc", "shm")
"""Transfers from every rank of the trainer to the engines on its own devices."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one rank or one server computes: a node of the job, the trainer's first, and GPUs of it by their number
    among those that the job may use there. No GPUs on a CPU."""

    node: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """Who computes where. Servers of somebody else, of whom only a URL is known, have no seat."""

    trainer: tuple[Seat, ...]
    """By rank."""
    engines: tuple[Seat, ...]
    """The servers of a node after one another; none where rank 0 has an engine of the user's own, or has vLLM inside
    the trainer's only process."""
    colocated: bool
    """Trainer and engines take turns in the memory of the same devices."""
    transfer: Transfer

    @property
    def ranks(self) -> int:
        """Ranks of the trainer on one node."""
        return sum(seat.node == 0 for seat in self.trainer)

    def servers(self, node: int) -> tuple[Seat, ...]:
        return tuple(seat for seat in self.engines if seat.node == node)


class _Home(Enum):
    """Where the engines are, seen from the trainer."""

    SHARED = "the trainer's GPUs"
    SPLIT = "other GPUs of the trainer's nodes"
    NODES = "nodes of their own"
    ELSEWHERE = "somebody else's machines"


def topology(config: Config, *, cuda: bool, gpus: int, ranks: int | None = None) -> Topology:
    """Where a configuration runs on its `cluster`, with `gpus` to use on each node.

    `ranks` of the trainer on a node are as many as there are GPUs for, unless told. Raises ConfigError where the GPUs
    do not suffice, and where the recipe asks for a transfer that they rule out.
    """
    cluster, servers = config.cluster, config.rollout.servers
    home = _home(config, cuda)
    width = servers.tensor if cuda else 0
    count = servers.count or _unasked(home, gpus, width)
    if _own_engine(config):
        count = 0
    taken = count * width if home is _Home.SPLIT else 0
    most = gpus - taken if cuda else None
    if cuda:
        _check_room(config, home, count, gpus, taken, ranks)
    own = ranks or most or 1
    if _inside(config, home, own, cuda):
        nodes = range(0)
    elif home is _Home.NODES:
        nodes = range(cluster.nodes, cluster.nodes + cluster.engine_nodes)
    else:
        nodes = range(cluster.nodes if servers.count else 1)
    first = gpus - taken if taken else 0
    found = Topology(
        trainer=tuple(
            Seat(node, (rank,) if cuda else ()) for node in range(cluster.nodes) for rank in range(own)
        ),
        engines=tuple(
            Seat(node, tuple(range(first + slot * width, first + (slot + 1) * width)))
            for node in nodes
            for slot in range(count)
        ),
        colocated=home is _Home.SHARED,
        transfer=_transfer(config, home, cuda),
    )
    if cuda and found.colocated:
        _check_handed_over(found)
    return found


def visible(gpus: tuple[int, ...], parent: str | None) -> str:
    """`CUDA_VISIBLE_DEVICES` of a process that is to see these GPUs, from that of its parent: a list of numbers, UUIDs
    or MIG instances, or None, where it sees all."""
    if parent is None:
        return ",".join(map(str, gpus))
    names = [name.strip() for name in parent.split(",") if name.strip()]
    if len(names) <= max(gpus, default=-1):
        raise ConfigError(
            f"GPU {max(gpus)} of this node is asked for, and CUDA_VISIBLE_DEVICES={parent} shows {len(names)}"
        )
    return ",".join(names[gpu] for gpu in gpus)


def _home(config: Config, cuda: bool) -> _Home:
    cluster, servers, placement = config.cluster, config.rollout.servers, config.rollout.placement
    if cluster.engine_nodes:
        if placement == "colocated":
            raise ConfigError(
                f"rollout.placement=colocated, and cluster.engine_nodes={cluster.engine_nodes} gives the engines"
                " GPUs of their own: change one of them"
            )
        return _Home.NODES
    if placement == "colocated":
        return _Home.SHARED
    # With several nodes and servers on each, the addresses are those of the trainer's other nodes.
    if servers.urls and (cluster.nodes == 1 or not servers.count):
        return _Home.SPLIT if servers.count else _Home.ELSEWHERE  # all of them are reached in one way
    if placement == "auto" and cuda and not config.selfplay.max_staleness:
        return _Home.SHARED
    return _Home.SPLIT


def _own_engine(config: Config) -> bool:
    """Whether rank 0 has an engine that the user brings, with which it does as it likes: nothing is started for it."""
    return config.rollout.kind != "vllm"


def _unasked(home: _Home, gpus: int, width: int) -> int:
    """Servers of a node where the recipe names no number."""
    if home is _Home.ELSEWHERE:
        return 0
    return max(1, gpus // width) if home is _Home.NODES and width else 1


def _inside(config: Config, home: _Home, ranks: int, cuda: bool) -> bool:
    """Whether the engine is inside the trainer's process: where that is the only one and waits for it.

    vLLM makes its groups over the whole world: an engine inside one rank of many would wait for the others.
    """
    servers = config.rollout.servers
    if servers.count or servers.urls or config.selfplay.max_staleness:
        return False
    return config.cluster.nodes * ranks == 1 and (home is _Home.SHARED or (home is _Home.SPLIT and not cuda))


def _transfer(config: Config, home: _Home, cuda: bool) -> Transfer:
    asked, shared = config.rollout.servers.transfer, home is _Home.SHARED
    if _own_engine(config):
        return "nccl" if cuda else "gloo"  # rank 0 has the tensors, and gives them on
    if asked == "auto":
        if shared:
            return "ipc" if cuda else "shm"
        return "nccl" if cuda else "gloo"
    if asked == "nccl" and shared:
        raise ConfigError(
            "rollout.servers.transfer=nccl cannot reach engines on the trainer's own GPUs: NCCL takes no two ranks on"
            " one GPU. Leave it at auto, or give the engines their own (rollout.placement=disaggregated)"
        )
    if asked == "ipc" and not shared:
        raise ConfigError(
            "rollout.servers.transfer=ipc hands over memory of one GPU, and the engines have their own: leave it at"
            " auto"
        )
    return asked


def _check_room(config: Config, home: _Home, count: int, gpus: int, taken: int, ranks: int | None) -> None:
    tensor = config.rollout.servers.tensor
    asked = f"{count} server(s) of {tensor} GPU(s) a node"
    remedy = "lower rollout.servers.count or .tensor"
    if count * tensor > gpus:
        raise ConfigError(f"rollout.servers: {asked} do not fit the {gpus} GPU(s) that a node has: {remedy}")
    if taken == gpus:
        raise ConfigError(
            f"rollout.servers: {asked} leave none of {gpus} GPU(s) to the trainer, and it is not to share them"
            f" (rollout.placement, selfplay.max_staleness): {remedy}, or give the engines nodes of their own"
            " (cluster.engine_nodes)"
        )
    if ranks is not None and ranks > gpus - taken:
        own = f", of which {asked} take {taken} for themselves" if home is _Home.SPLIT else ""
        raise ConfigError(f"{ranks} ranks do not fit the {gpus} GPU(s) of a node{own}: start {gpus - taken}")


def _check_handed_over(found: Topology) -> None:
    """Every engine GPU needs a rank of the trainer on it, which hands over the weights."""
    there = {(seat.node, gpu) for seat in found.trainer for gpu in seat.gpus}
    alone = sorted({(seat.node, gpu) for seat in found.engines for gpu in seat.gpus} - there)
    if alone:
        node, gpu = alone[0]
        raise ConfigError(
            f"GPU {gpu} of node {node} would have an engine and no rank of the trainer, which hands over the weights"
            f" there: start {1 + max(g for _, g in alone)} ranks on a node, or lower rollout.servers"
        )
