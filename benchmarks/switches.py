"""Training steps with every switch of the policy on and off, measured beside what the planner says of an H100."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from benchmarks.common import median_seconds
from benchmarks.device import ASSUMED, SAMPLED
from spell_megatron.config import ClusterConfig, Config, LayoutConfig, OptimizerConfig, PolicyConfig
from spell_megatron.policy.head import Sampled
from spell_megatron.policy.layout import check_layout
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.tools.plan.parameters import stage_parameters
from spell_megatron.tools.plan.traffic import step_traffic
from spell_megatron.tools.plan.update import update_costs
from spell_megatron.tools.plan.workload import batch_work, group_lengths
from spell_megatron.types import Group, SpellError, TrainBatch
from spell_megatron.weights.shape import ModelShape, model_shape

BASE = PolicyConfig(recompute="full", optimizer=OptimizerConfig(distributed=True))
NOT_HERE = "not here"
_NO_SWITCHES = {"layout", "loss", "dtype", "freeze_router", "router_dtype", "router_replay"}
"""Keys of the policy that say what is computed, and not how."""


def settings(base: PolicyConfig = BASE) -> Iterator[tuple[str, PolicyConfig, Sampled]]:
    """The base, then every switch alone at each of its other values: `key=value`, the policy, what it samples from.

    A switch is a key that is a yes or no, or one of a few words; keys that are added join by themselves.
    """
    yield "as recipes have it", base, SAMPLED
    yield "top_p=1", base, replace(SAMPLED, top_p=1.0)
    for key, value, changed in _others(base):
        yield f"{key}={value}", changed, SAMPLED


def _others(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Keys of a dataclass and of those within it, with another value, and the dataclass that has it."""
    hints = get_type_hints(type(config))
    for key in (field.name for field in fields(config) if field.name not in _NO_SWITCHES):
        kind, present = hints[key], getattr(config, key)
        values = (False, True) if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
        yield from ((key, value, replace(config, **{key: value})) for value in values if value != present)
        if is_dataclass(present):
            yield from (
                (f"{key}.{name}", value, replace(config, **{key: changed}))
                for name, value, changed in _others(present)
            )


def step(
    policy: PolicyConfig, folder: Path, group: Group, rounds: int, peak: float, sampled: Sampled = SAMPLED
) -> dict[str, Any]:
    """One update by a group, timed: its work, as a share of `peak` too, the planner's time, the memory that it took."""
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=1800)
    try:
        learner, batch = Learner(policy, folder, world, sampled=sampled), TrainBatch((group,))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(lambda: learner.update(batch), rounds)
    finally:
        torch.use_deterministic_algorithms(False)  # policy.deterministic turns it on for good
        stop_world()
    shape, shared = model_shape(folder), policy.share_prompts
    computed = len(group.prompt) * (1 if shared else len(group.samples)) + batch.response_tokens
    done = 3 * batch_work(shape, group_lengths(batch), shared=shared).total / seconds
    return {
        "prompt": "shared" if shared else "repeated",
        "seconds": seconds,
        "H100 s, predicted": predicted(policy, shape, batch),
        "tokens/s": computed / seconds,
        "answers' tokens/s": batch.response_tokens / seconds,
        "TFLOP/s": done / 1e12,
        "MFU": done / peak,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }


def try_step(
    policy: PolicyConfig, folder: Path, group: Group, rounds: int, peak: float, sampled: Sampled
) -> dict[str, Any]:
    """`step`; where this machine cannot do that, why not."""
    try:
        return step(policy, folder, group, rounds, peak, sampled)
    except (SpellError, torch.OutOfMemoryError) as error:
        return {NOT_HERE: str(error).splitlines()[0].partition(":")[0]}


def predicted(policy: PolicyConfig, shape: ModelShape, batch: TrainBatch) -> float:
    """Seconds of the update on one H100, by the planner."""
    config = Config(policy=policy, cluster=ClusterConfig(nodes=1, gpus_per_node=1))
    world, parts = check_layout(policy.layout, shape, 1), stage_parameters(shape, policy.layout)
    lengths, shared = list(group_lengths(batch)), policy.share_prompts
    tokens = sum(prompt * (1 if shared else len(replies)) + sum(replies) for prompt, replies in lengths)
    rows = batch.response_tokens
    traffic = step_traffic(shape, policy, world, parts, tokens, rows, config.cluster.gpus_per_node)
    work = batch_work(shape, lengths, shared=shared)
    return sum(update_costs(config, shape, world, work, tokens, rows, 1, traffic, parts, ASSUMED).values())
