"""What planning a recipe finds: what every pipeline stage holds in each phase, whether it fits, what a step costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spell_megatron.config import Config
from spell_megatron.policy.layout import WorldShape
from spell_megatron.tools.plan.activations import Activations
from spell_megatron.tools.plan.assumptions import GIB, Assumptions
from spell_megatron.tools.plan.engine import EngineMemory
from spell_megatron.tools.plan.parameters import StageParameters, Static, active_parameters, total_parameters
from spell_megatron.tools.plan.rehearsal import Rehearsal
from spell_megatron.tools.plan.saving import Saving
from spell_megatron.tools.plan.timing import Seconds
from spell_megatron.tools.plan.traffic import Traffic
from spell_megatron.tools.plan.workload import Lengths, Work
from spell_megatron.weights.shape import ModelShape

ROOM = 0.08
"""Share of GPU memory that should stay free at the peak: what the planner cannot see."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One rank of a pipeline stage, in bytes by phase."""

    stage: int
    parameters: StageParameters
    static: Static
    activations: Activations
    update: int
    rollout: int
    resync: int

    @property
    def peak(self) -> int:
        return max(self.update, self.rollout, self.resync)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe needs. Bytes are of one GPU, operations of the whole run, traffic of one GPU."""

    config: Config
    shape: ModelShape
    world: WorldShape
    stages: tuple[StagePlan, ...]
    engine: EngineMemory
    lengths: Lengths
    streams: int
    """Microbatches of one data-parallel rank in a step."""
    work: Work
    """One forward pass over the batch, as configured."""
    work_shared: Work
    """The same with every prompt computed once."""
    work_unshared: Work
    """The same with every prompt computed anew for each response."""
    traffic: Traffic
    costs: dict[str, float]
    """Seconds of an update, by what takes them."""
    seconds: Seconds
    seconds_unshared: Seconds
    saving: Saving
    faults: tuple[str, ...]
    """Why the recipe cannot run, besides memory."""
    notes: tuple[str, ...]
    """What the user must see to, and what is set and not in the plan."""
    assumed: Assumptions
    rehearsal: Rehearsal | None = None
    """The real model's ranks; None where arithmetic alone speaks."""
    remedies: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        engine = self.engine.device + round(self.assumed.engine_gib * GIB)
        return max([stage.peak for stage in self.stages] + ([] if self.engine.colocated else [engine]))

    @property
    def headroom(self) -> float:
        """Free share of GPU memory at the peak; negative where it does not fit."""
        return 1 - self.peak / (self.config.cluster.gpu_memory_gib * GIB)

    @property
    def fits(self) -> bool:
        return self.headroom >= 0 and not self.faults

    @property
    def fits_well(self) -> bool:
        """It fits, and enough stays free."""
        return self.fits and self.headroom >= ROOM

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak that an update's operations are, recomputation not counted."""
        return 3 * self.work.total / (self.seconds.update * self.world.size * self.assumed.peak_flops)

    def flops(self, *, shared: bool) -> float:
        """Operations of a step's update: forward and backward over the batch, without recomputation."""
        return 3 * (self.work_shared if shared else self.work_unshared).total

    def to_dict(self) -> dict[str, Any]:
        """The JSON answer of `spell-megatron plan`."""
        layout = self.config.policy.layout
        return {
            "recipe": self.config.name,
            "model": self.config.model.path,
            "gpus": self.world.size,
            "nodes": self.config.cluster.nodes,
            "engine_gpus": self.engine.gpus,
            "layout": asdict(layout) | {"data": self.world.data},
            "parameters_total": total_parameters(self.shape),
            "parameters_active": active_parameters(self.shape),
            "fits": self.fits,
            "headroom": self.headroom,
            "faults": list(self.faults),
            "notes": list(self.notes),
            "remedies": list(self.remedies),
            "per_rank": [self._row(stage) for stage in self.stages],
            "engine": asdict(self.engine),
            "flops_per_step": 3 * self.work.total,
            "flops_per_step_shared": self.flops(shared=True),
            "flops_per_step_unshared": self.flops(shared=False),
            "communication_bytes": asdict(self.traffic) | {"total": self.traffic.total},
            "seconds_per_step": self.seconds.total,
            "seconds": asdict(self.seconds),
            "update_seconds": self.costs,
            "mfu": self.mfu,
            "seconds_per_step_unshared": self.seconds_unshared.total,
            "checkpoint": asdict(self.saving),
            "microbatches": self.streams,
            "built": self.rehearsal is not None,
            "hf_weights_covered": self.rehearsal.hf_weights if self.rehearsal else None,
            "assumptions": asdict(self.assumed),
        }

    def _row(self, stage: StagePlan) -> dict[str, Any]:
        built = [rank for rank in self.rehearsal.ranks if rank.stage == stage.stage] if self.rehearsal else []
        return {
            "stage": stage.stage,
            "ranks": self.world.size // self.config.policy.layout.pipeline,
            "layers": stage.parameters.layers,
            "parameters": stage.parameters.total,
            "parameters_expert": stage.parameters.expert,
            "weights": stage.static.weights,
            "gradients": stage.static.gradients,
            "optimizer": stage.static.optimizer,
            "reference": stage.static.reference,
            "optimizer_on_host": stage.static.host,
            "activations": asdict(stage.activations) | {"peak": stage.activations.peak},
            "update": stage.update,
            "rollout": stage.rollout,
            "resync": stage.resync,
            "shapes": built[0].shapes if built else {},
        }
