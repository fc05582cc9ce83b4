"""How many machines a job takes and what runs on each: the recipe's wishes, the profile's where it has any."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launchers.profile import Profile, ProfileError
from spell_megatron.config import Config


@dataclass(frozen=True, slots=True)
class Machines:
    """The trainer's nodes come first, then those of the engine alone. Per node: `gpus`, `ranks`, `servers`."""

    nodes: int = 1
    gpus: int = 0
    ranks: int = 1
    engine_nodes: int = 0
    servers: int = 0

    @property
    def world_size(self) -> int:
        """Of the trainer."""
        return self.nodes * self.ranks

    @property
    def allocated(self) -> int:
        return self.nodes + self.engine_nodes

    @property
    def serving(self) -> range:
        """Nodes whose vLLM servers the launcher starts. On its own first node the trainer does that itself."""
        if self.engine_nodes:
            return range(self.nodes, self.allocated)
        return range(1, self.nodes) if self.servers else range(0)


def machines(profile: Profile, config: Config) -> Machines:
    """Raises ProfileError where ranks and GPUs do not go together."""
    wish, servers = config.cluster, config.rollout.servers
    gpus = wish.gpus_per_node if profile.gpus_per_node is None else profile.gpus_per_node
    ranks = profile.ranks_per_node or gpus or 1
    engine_nodes = wish.engine_nodes if profile.engine_nodes is None else profile.engine_nodes
    if gpus and ranks > gpus:
        raise ProfileError(f"ranks_per_node={ranks} do not fit {gpus} GPUs a node: lower it, or leave it out")
    count = servers.count or (max(1, gpus // servers.tensor) if engine_nodes else 0)
    if gpus and count * servers.tensor > gpus:
        raise ProfileError(
            f"{count} servers of {servers.tensor} GPUs do not fit a node of {gpus}: rollout.servers"
        )
    return Machines(profile.nodes or wish.nodes, gpus, ranks, engine_nodes, count)


def recorded(config: Config, on: Machines) -> Config:
    """The configuration with the machines that it really gets."""
    gpus = on.gpus or config.cluster.gpus_per_node
    cluster = replace(config.cluster, nodes=on.nodes, gpus_per_node=gpus, engine_nodes=on.engine_nodes)
    return replace(config, cluster=cluster)
