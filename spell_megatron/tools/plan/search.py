"""Layouts for a number of GPUs, ranked; and the smallest changes that make a recipe fit. Arithmetic only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from spell_megatron.config import Config, LayoutConfig, written
from spell_megatron.policy.layout import LayoutError
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.changes import changed, resized
from spell_megatron.tools.plan.estimate import estimate
from spell_megatron.tools.plan.findings import Plan

_SHOWN = 10


def search(config: Config, gpus: int | None = None, gpu_memory_gib: float | None = None) -> list[Plan]:
    """The ten fastest layouts of a recipe that fit with room to spare, fastest first; [] where none does."""
    config, assumed = resized(config, gpus, gpu_memory_gib), Assumptions()
    fitting = []
    for candidate in _candidates(config):
        # To the host only what does not fit otherwise, and has master weights.
        for offload in (False, True) if config.policy.master_weights else (False,):
            found = _estimate(changed(candidate, {"policy.optimizer.cpu_offload": offload}), assumed)
            if found is not None and found.fits_well:
                fitting.append(found)
                break
    # An equal time goes to the simpler layout: fewer ranks that hold one copy of the model.
    fitting.sort(key=lambda plan: (round(plan.seconds.total, 1), plan.world.model))
    return fitting[:_SHOWN]


def remedies(found: Plan) -> list[str]:
    """Up to three ways to make a plan fit, the fastest first: single changes, else two together, else three."""
    steps = list(_steps(found))
    for count in (1, 2, 3):
        helpful: list[tuple[float, str]] = []
        for chosen in itertools.combinations(steps, count):
            changes = dict(chosen)
            if len(changes) < count:
                continue
            after = _estimate(changed(found.config, changes), found.assumed)
            if after is not None and after.fits_well:
                text = " ".join(f"{key}={written(value)}" for key, value in changes.items())
                helpful.append((after.seconds.total, f"{text} (headroom {after.headroom:.0%})"))
        if helpful:
            return [text for _, text in sorted(helpful)[:3]]
    return []


def _candidates(config: Config) -> Iterator[Config]:
    per_node, gpus = config.cluster.gpus_per_node, config.cluster.gpus
    inside = [size for size in (1, 2, 4, 8, 16) if size <= per_node]
    across = [size for size in (1, 2, 4, 8, 16) if size <= gpus]
    for tensor, context, pipeline, expert in itertools.product(inside, across, across, inside):
        if tensor * context * pipeline > gpus:
            continue
        layout = LayoutConfig(
            tensor=tensor, sequence=tensor > 1, context=context, pipeline=pipeline, expert=expert
        )
        for recompute in ("none", "all_but_attention", "full"):
            yield changed(
                config,
                {
                    "policy.layout": layout,
                    "policy.recompute": recompute,
                    "policy.optimizer.distributed": True,
                },
            )


def _steps(found: Plan) -> Iterator[tuple[str, Any]]:
    """Single changes that lower the need, the cheap ones first."""
    config, layout = found.config, found.config.policy.layout
    policy, per_node = config.policy, config.cluster.gpus_per_node
    if policy.recompute == "none":
        yield "policy.recompute", "all_but_attention"
    if policy.recompute != "full":
        yield "policy.recompute", "full"
    if not policy.optimizer.distributed:
        yield "policy.optimizer.distributed", True
    if policy.stream_tokens > config.rollout.max_model_len:
        yield "policy.stream_tokens", config.rollout.max_model_len
    if policy.head_chunk > 256:
        yield "policy.head_chunk", policy.head_chunk // 4
    if layout.tensor * 2 <= per_node:
        yield "policy.layout", replace(layout, tensor=layout.tensor * 2, sequence=True)
    yield "policy.layout", replace(layout, context=layout.context * 2)
    yield "policy.layout", replace(layout, pipeline=layout.pipeline * 2)
    if found.shape.experts and layout.expert * 2 <= per_node:
        yield "policy.layout", replace(layout, expert=layout.expert * 2)
    if found.engine.kv_cache < found.engine.sequence:
        yield "rollout.kv_cache_mib", -(-found.engine.sequence >> 20)
    servers = config.rollout.servers
    if servers.count > 1 and servers.count % 2 == 0:
        yield "rollout.servers", replace(servers, count=servers.count // 2, tensor=servers.tensor * 2)
    if not policy.optimizer.cpu_offload and policy.master_weights:
        yield "policy.optimizer", replace(policy.optimizer, cpu_offload=True, distributed=True)
    yield "cluster.nodes", config.cluster.nodes * 2


def _estimate(config: Config, assumed: Assumptions) -> Plan | None:
    try:
        return estimate(config, assumed)
    except LayoutError:
        return None
