"""Which parallel layouts are legal for a model, and why not: decided before any process starts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spell_megatron.config import LayoutConfig, PolicyConfig
from spell_megatron.types import SpellError
from spell_megatron.weights.shape import ModelShape


class LayoutError(SpellError):
    exit_code = 2


@dataclass(frozen=True, slots=True)
class WorldShape:
    """How many ranks share what. `model` ranks hold one copy of the policy; `data` copies train together."""

    size: int
    model: int
    data: int
    expert_data: int


def check_layout(layout: LayoutConfig, shape: ModelShape, world_size: int) -> WorldShape:
    """Raise `LayoutError` with every reason, or return how the world divides."""
    tp, pp, cp, ep, etp = (
        layout.tensor,
        layout.pipeline,
        layout.context,
        layout.expert,
        layout.expert_tensor,
    )
    vpp = layout.virtual_pipeline or 1
    model = tp * pp * cp
    faults: list[str] = []

    def need(holds: bool, reason: str) -> None:
        if not holds:
            faults.append(reason)

    need(
        world_size % model == 0,
        f"world size {world_size} is no multiple of tensor*pipeline*context = {model}",
    )
    need(shape.heads % tp == 0, f"{shape.heads} attention heads do not divide by tensor={tp}")
    need(
        shape.kv_heads % tp == 0 or (tp % shape.kv_heads == 0 and shape.kv_heads < tp),
        f"{shape.kv_heads} key-value heads and tensor={tp}: one must be a multiple of the other",
    )
    need(shape.vocab % tp == 0, f"a vocabulary of {shape.vocab} does not divide by tensor={tp}")
    need(
        shape.layers % (pp * vpp) == 0, f"{shape.layers} layers do not divide by pipeline={pp} x chunks={vpp}"
    )
    need(vpp == 1 or pp > 1, "virtual_pipeline needs pipeline > 1")
    if shape.experts:
        need(shape.experts % ep == 0, f"{shape.experts} experts do not divide by expert={ep}")
        need(
            shape.expert_ffn % etp == 0,
            f"expert width {shape.expert_ffn} does not divide by expert_tensor={etp}",
        )
        need(
            world_size % (ep * etp * pp) == 0,
            f"world size {world_size} is no multiple of expert*expert_tensor*pipeline = {ep * etp * pp}",
        )
        need(
            tp == 1 or layout.sequence,
            "experts with tensor > 1 need sequence=true (megatron-core requires it)",
        )
    else:
        need(shape.ffn % tp == 0, f"an MLP width of {shape.ffn} does not divide by tensor={tp}")
        need(
            ep == 1 and etp == 1,
            f"{shape.family.name} has no experts: expert and expert_tensor must be 1",
        )
    if faults:
        raise LayoutError("this layout cannot work:\n" + "\n".join(f"  {fault}" for fault in faults))
    return WorldShape(world_size, model, world_size // model, world_size // (ep * etp * pp))


def check_policy(policy: PolicyConfig, shape: ModelShape, world_size: int) -> WorldShape:
    """`check_layout`, and of what a policy asks of experts that the model has some. Raises `LayoutError`."""
    asked = {
        "policy.freeze_router=true": policy.freeze_router,
        "policy.router_replay=true": policy.router_replay,
        f"policy.dispatcher={policy.dispatcher}": policy.dispatcher in ("deepep", "hybridep"),
    }
    if (keys := [key for key, is_asked in asked.items() if is_asked]) and not shape.experts:
        raise LayoutError(
            f"{' and '.join(keys)} would do nothing, since {shape.family.title} is a dense model: leave"
            f" {'it' if len(keys) == 1 else 'them'} out"
        )
    return check_layout(policy.layout, shape, world_size)


@dataclass(frozen=True, slots=True)
class Depth:
    """Layers of one chunk of a pipeline stage, by what they keep for the backward pass."""

    recomputed: int
    """The first ones: their input, and what `recompute` says besides."""
    offloaded: int
    """Spread among the others: everything, in host memory."""
    kept: int
    """Everything, on the device."""


def depth(policy: PolicyConfig, shape: ModelShape) -> Depth:
    """Raises `LayoutError` where there are fewer layers."""
    layers = shape.layers // (policy.layout.pipeline * (policy.layout.virtual_pipeline or 1))
    recomputed = 0 if policy.recompute == "none" else policy.recompute_layers or layers
    kept = layers - recomputed - policy.offload_layers
    if kept < (1 if policy.offload_layers else 0):
        raise LayoutError(
            f"a pipeline stage or chunk has {layers} layers: policy.recompute_layers={policy.recompute_layers} and"
            f" policy.offload_layers={policy.offload_layers} come to more, or leave none that keeps its own"
        )
    return Depth(recomputed, policy.offload_layers, kept)


def dispatcher(policy: PolicyConfig, gpus_per_node: int, *, deepep: bool) -> str:
    """Who sends tokens to experts, where DeepEP is installed (`deepep`) or not: what `auto` comes to.

    DeepEP's kernels send bfloat16 among two, four or eight GPUs of a node. Among more they want a network set up for
    them, and that sums come out in the same bits twice they do not promise.
    """
    if policy.dispatcher != "auto":
        return policy.dispatcher
    ranks = policy.layout.expert * policy.layout.expert_tensor
    within = ranks in (2, 4, 8) and gpus_per_node % ranks == 0
    fits = within and policy.dtype == "bfloat16" and not policy.deterministic
    return "deepep" if deepep and fits else "alltoall"


def megatron_sizes(layout: LayoutConfig) -> dict[str, Any]:
    """The layout by megatron-core's own names, for whatever takes it."""
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }
