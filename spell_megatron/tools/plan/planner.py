"""Plans of recipes: arithmetic, the real model built rank by rank, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spell_megatron.config import Config
from spell_megatron.tools.plan.assumptions import Assumptions
from spell_megatron.tools.plan.catalogue import architecture
from spell_megatron.tools.plan.changes import resized
from spell_megatron.tools.plan.estimate import estimate
from spell_megatron.tools.plan.findings import Plan
from spell_megatron.tools.plan.rehearsal import Build, rehearse
from spell_megatron.tools.plan.search import remedies


def plan(config: Config, gpus: int | None = None, gpu_memory_gib: float | None = None) -> Plan:
    """Plan a recipe, on its own cluster or on `gpus` GPUs of `gpu_memory_gib`. LayoutError where it cannot run."""
    return plan_all([resized(config, gpus, gpu_memory_gib)])[0]


def plan_all(configs: Sequence[Config], assumed: Assumptions | None = None) -> list[Plan]:
    """Plan several recipes, their models built in one process. SpellError where a model contradicts arithmetic."""
    assumed = assumed or Assumptions()
    drafts = [estimate(config, assumed) for config in configs]
    jobs = [
        Build(config.policy, architecture(config.model.path), draft.world.size, config.model.families)
        for config, draft in zip(configs, drafts, strict=True)
    ]
    plans = []
    for draft, rehearsal in zip(drafts, rehearse(jobs), strict=True):
        built = estimate(draft.config, assumed, rehearsal)
        plans.append(built if built.fits_well else replace(built, remedies=tuple(remedies(draft))))
    return plans
