"""A plan as text for a terminal or a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from spell_megatron.config import PolicyConfig
from spell_megatron.tools.plan.assumptions import GIB
from spell_megatron.tools.plan.findings import ROOM, Plan
from spell_megatron.tools.plan.parameters import active_parameters, total_parameters

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def render(plan: Plan) -> str:
    """Memory by stage and phase, operations, traffic, time, verdict, assumptions."""
    return "\n".join(
        [*_head(plan), "", *_memory(plan), "", *_costs(plan), "", *_verdict(plan), "", *_small(plan)]
    )


def ranking(plans: Sequence[Plan]) -> str:
    """One line a layout, in the order given."""
    rows: list[tuple[str, ...]] = [
        ("layout", "recompute", "optimizer", "peak GiB", "free", "s a step", "s an update")
    ]
    for plan in plans:
        policy = plan.config.policy
        rows.append(
            (
                layout_words(plan),
                policy.recompute,
                "host" if policy.optimizer.cpu_offload else "GPU",
                gib(plan.peak),
                f"{plan.headroom:.0%}",
                f"{plan.seconds.total:.0f}",
                f"{plan.seconds.update:.0f}",
            )
        )
    if not plans:
        return "no layout fits: more GPUs, or less text at a time"
    notes = dict.fromkeys(f"  note: {note}" for plan in plans for note in plan.notes)
    return "\n".join([*_aligned(rows), *notes])


def layout_words(plan: Plan) -> str:
    layout = plan.config.policy.layout
    sizes = {
        "TP": layout.tensor,
        "CP": layout.context,
        "PP": layout.pipeline,
        "VPP": layout.virtual_pipeline or 1,
        "EP": layout.expert,
        "ETP": layout.expert_tensor,
        "DP": plan.world.data,
    }
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    return " ".join(words + (["SP"] if layout.sequence else [])) or "one GPU"


def _head(plan: Plan) -> list[str]:
    config, policy, engine = plan.config, plan.config.policy, plan.engine
    cluster = config.cluster
    total, active = total_parameters(plan.shape), active_parameters(plan.shape)
    optimizer = policy.optimizer
    state = "in host memory" if optimizer.cpu_offload else "sharded" if optimizer.distributed else "whole"
    where = "on the same GPUs, asleep during updates" if engine.colocated else "on GPUs of their own"
    lines = [
        f"{config.name}: {config.model.path}, {number(total)} parameters, {number(active)} active",
        f"trainer  {plan.world.size} GPUs of {cluster.gpu_memory_gib:g} GiB, {layout_words(plan)}; {policy.dtype}, "
        f"recompute {_recompute(policy)}, optimizer state {state}",
        f"engine   {engine.engines} x {engine.tensor} GPUs {where}",
        f"step     {config.selfplay.questions} questions, prompts of {plan.lengths.prompt} tokens, "
        f"{config.selfplay.group_size} responses of {plan.lengths.response} on average; "
        f"{plan.streams} streams of {policy.stream_tokens} tokens for every data-parallel rank",
    ]
    if plan.rehearsal is not None:
        lines.append(
            f"model    built on {len(plan.rehearsal.ranks)} ranks; its {plan.rehearsal.hf_weights} Hugging Face "
            "weights are covered exactly once"
        )
    return lines


def _recompute(policy: PolicyConfig) -> str:
    some = f" in {policy.recompute_layers} layers" if policy.recompute_layers else ""
    away = f", {policy.offload_layers} layers' activations in host memory" if policy.offload_layers else ""
    return f"{policy.recompute}{some}{away}"


def _memory(plan: Plan) -> list[str]:
    engine, phases = plan.engine, ("update", "rollout", "resync")
    held: tuple[str, ...] = ("weights", "gradients", "optimizer")
    if plan.config.policy.loss.kl > 0:
        held += ("reference",)
    rows: list[tuple[str, ...]] = [("stage", "layers", "parameters", *held, "activations", *phases)]
    for stage in plan.stages:
        words = (str(stage.stage), str(stage.parameters.layers), number(stage.parameters.total))
        sizes = [getattr(stage.static, kind) for kind in held]
        sizes += [stage.activations.peak, *(getattr(stage, phase) for phase in phases)]
        rows.append((*words, *map(gib, sizes)))
    return [
        "GiB on one GPU, by pipeline stage",
        *_aligned(rows),
        f"engine, GiB on one GPU: weights {gib(engine.weights)}, KV cache {gib(engine.kv_cache)} "
        f"(planned questions need {gib(engine.kv_wanted)}), workspace {gib(engine.workspace)}",
    ]


def _costs(plan: Plan) -> list[str]:
    kinds = ", ".join(f"{kind} {number(size)}B" for kind, size in asdict(plan.traffic).items() if size)
    shared, unshared = plan.flops(shared=True), plan.flops(shared=False)
    s, u, saved = plan.seconds, plan.seconds_unshared, plan.saving
    beside = " beside" if s.overlapped else ","
    return [
        f"operations of an update   {number(3 * plan.work.total)}FLOP "
        f"(shared prompts {number(shared)}, each response its own {number(unshared)}: {unshared / shared:.1f} x)",
        f"sent by a GPU in a step   {kinds or 'nothing'}",
        f"seconds of a step         {s.total:.0f}: rollout {s.rollout:.0f}{beside} update {s.update:.0f}, "
        f"resync {s.resync:.1f} (each response with its own prompt: update {u.update:.0f}, step {u.total:.0f})",
        f"MFU of the update         {plan.mfu:.0%}; most of its seconds: {_largest(plan.costs, 3)}",
        f"a checkpoint of {number(saved.whole)}B    {gib(saved.staged)} GiB a rank: training waits "
        f"{saved.blocked:.1f} s, written after {saved.written:.0f} s, resumed from in {saved.loaded:.0f} s",
        f"host memory of a node     {gib(saved.host)} GiB at the most",
    ]


def _largest(costs: dict[str, float], count: int) -> str:
    ranked = sorted(costs.items(), key=lambda cost: -cost[1])[:count]
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in ranked)


def _verdict(plan: Plan) -> list[str]:
    peak = f"peak {gib(plan.peak)} of {plan.config.cluster.gpu_memory_gib:g} GiB, {plan.headroom:.0%} free"
    lines = [f"fits: {peak}" if plan.fits else f"DOES NOT FIT: {peak}"]
    if plan.fits and not plan.fits_well:
        lines[0] += f"; less than the {ROOM:.0%} that should be"
    lines += [f"  fault: {fault}" for fault in plan.faults]
    lines += [f"  try: {remedy}" for remedy in plan.remedies]
    return lines + [f"  note: {note}" for note in plan.notes]


def _small(plan: Plan) -> list[str]:
    return ["assumed", *(f"  {line}" for line in plan.assumed.describe())]


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def number(value: float) -> str:
    """Three digits and a metric prefix; G for 10⁹."""
    for factor, unit in _UNITS:
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} "


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(size) for cell, size in zip(row, widths, strict=True)) for row in rows]
