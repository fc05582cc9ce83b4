"""What the rollout engine takes of a GPU: weights, KV cache, workspace."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spell_megatron.base.topology import topology
from spell_megatron.config import Config, ConfigError
from spell_megatron.tools.plan.assumptions import GIB, Assumptions
from spell_megatron.tools.plan.parameters import total_parameters
from spell_megatron.tools.plan.workload import Lengths
from spell_megatron.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """One GPU of one engine, in bytes, and what its KV cache is asked to hold."""

    engines: int
    """In the whole run."""
    tensor: int
    colocated: bool
    """On the trainer's GPUs, asleep during updates."""
    weights: int
    workspace: int
    kv_cache: int
    kv_wanted: int
    """For the planned concurrency: each question's prompt once, its responses at their mean length."""
    token_bytes: int
    """Keys and values of one token on one GPU."""
    sequence: int
    """Keys and values of the longest sequence: the engine does not start with less."""
    fault: str = ""
    """Why it has no GPUs to be on."""

    @property
    def gpus(self) -> int:
        return self.engines * self.tensor

    @property
    def fitting(self) -> float:
        """Share of the planned questions that the KV cache holds at once; vLLM has the others wait."""
        return min(1.0, self.kv_cache / self.kv_wanted)

    @property
    def device(self) -> int:
        return self.weights + self.workspace + self.kv_cache


def engine_memory(
    config: Config, shape: ModelShape, lengths: Lengths, nodes: int, memory_gib: float, assumed: Assumptions
) -> EngineMemory:
    """Bytes of an engine on one GPU of `memory_gib`; its `fault` says why there cannot be one."""
    servers, rollout = config.rollout.servers, config.rollout
    cluster = replace(config.cluster, nodes=nodes)
    colocated, engines, fault = not cluster.engine_nodes, servers.count * nodes, ""
    tensor = servers.tensor if servers.count else 1
    try:
        found = topology(replace(config, cluster=cluster), cuda=True, gpus=cluster.gpus_per_node)
        colocated, engines = found.colocated, len(found.engines) + len(servers.urls)
        tensor = len(found.engines[0].gpus) if found.engines else tensor
    except ConfigError as error:
        fault = str(error)
    engines = max(1, engines)
    b = 4 if rollout.dtype == "float32" else 2
    heads = max(1, shape.kv_heads // tensor)
    token = 2 * shape.layers * heads * shape.head_dim * b
    questions = -(-config.selfplay.concurrency // engines)
    group = lengths.prompt + config.selfplay.group_size * lengths.response
    weights = total_parameters(shape) * b // tensor
    workspace = _workspace(config, shape, tensor, b)
    if rollout.kv_cache_mib is not None:
        cache = rollout.kv_cache_mib << 20
    else:
        share = rollout.gpu_memory * memory_gib - assumed.engine_gib
        cache = max(0, round(share * GIB) - weights - workspace)
    return EngineMemory(
        engines=engines,
        tensor=tensor,
        colocated=colocated,
        fault=fault,
        weights=weights,
        workspace=workspace,
        kv_cache=cache,
        kv_wanted=questions * group * token,
        token_bytes=token,
        sequence=rollout.max_model_len * token,
    )


def _workspace(config: Config, shape: ModelShape, tensor: int, b: int) -> int:
    """Activations of one step's tokens, and sampling over the whole vocabulary (logits, sorted copy, order)."""
    rollout = config.rollout
    ffn = shape.ffn if not shape.experts else shape.expert_ffn * shape.experts_per_token * tensor
    tokens = rollout.max_batched_tokens * (4 * shape.hidden + 3 * ffn // tensor) * b
    return tokens + rollout.max_num_seqs * shape.vocab * 20
