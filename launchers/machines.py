"""How many machines a job takes and what runs on each: the recipe's wishes, the profile's where it has any."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launchers.profile import Profile
from spell_megatron.base.topology import topology
from spell_megatron.config import Config


@dataclass(frozen=True, slots=True)
class Machines:
    """The trainer's nodes come first, then those of the engine alone. Per node: `gpus` that SLURM is asked for by their
    number, `ranks`, `servers`, and `other_gpus`, which it gives without (`request_gpus`)."""

    nodes: int = 1
    gpus: int = 0
    ranks: int = 1
    engine_nodes: int = 0
    servers: int = 0
    other_gpus: int = 0

    @property
    def world_size(self) -> int:
        """GPUs of the trainer."""
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
    """Raises SpellError where ranks, servers and GPUs do not go together."""
    wish = config.cluster
    gpus = wish.gpus_per_node if profile.gpus_per_node is None else profile.gpus_per_node
    nodes = profile.nodes or wish.nodes
    engine_nodes = wish.engine_nodes if profile.engine_nodes is None else profile.engine_nodes
    cluster = replace(wish, nodes=nodes, engine_nodes=engine_nodes)
    found = topology(replace(config, cluster=cluster), cuda=gpus > 0, gpus=gpus, ranks=profile.ranks_per_node)
    counted = bool(config.rollout.servers.count or engine_nodes) and bool(found.engines)
    servers = len(found.servers(found.engines[-1].node)) if counted else 0
    asked, other = (gpus, 0) if profile.request_gpus else (0, gpus)
    return Machines(nodes, asked, found.ranks, engine_nodes, servers, other)


def recorded(config: Config, on: Machines) -> Config:
    """The configuration with the machines that it really gets."""
    gpus = on.gpus or on.other_gpus or config.cluster.gpus_per_node
    cluster = replace(config.cluster, nodes=on.nodes, gpus_per_node=gpus, engine_nodes=on.engine_nodes)
    return replace(config, cluster=cluster)
