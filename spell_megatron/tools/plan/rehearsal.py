"""Build a recipe's real model, rank by rank, in a world that does not exist.

torch's fake process group lets one process pretend to be any rank of a world of any size, and parameters on
the meta device have shapes and no memory. So the very code that trains says what a rank holds: its modules,
Megatron's gradient buffers, and the ranges of the distributed optimizer. This runs in a process of its
own, since it replaces the device and joins process groups: `python -m spell_megatron.tools.plan.rehearsal`, jobs in
on standard input, findings out on standard output, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from spell_megatron.base.interpreter import environment, python
from spell_megatron.config import PolicyConfig
from spell_megatron.types import SpellError
from spell_megatron.weights.families import Family
from spell_megatron.weights.shape import ModelShape

_SECONDS_PER_JOB = 300


@dataclass(frozen=True, slots=True)
class Build:
    """A model to build."""

    policy: PolicyConfig
    folder: Path
    """With its config.json."""
    size: int
    """Ranks of the world."""
    families: tuple[str, ...] = ()
    """A user's own, by import path."""


_BUILDS = TypeAdapter(list[Build])


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank of the full world holds, in bytes and parameters."""

    rank: int
    stage: int
    dense: int
    expert: int
    weights: int
    gradients: int
    optimizer: int
    shapes: dict[str, list[int]]
    """Shapes of every parameter, by Megatron's name, chunk by chunk."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The ranks that were built: the first and the last of every pipeline stage."""

    ranks: list[Rank]
    hf_weights: int
    """Tensors in the Hugging Face model, each covered exactly once by the ranks together."""
    hf_parameters: int


def rehearse(jobs: Sequence[Build]) -> list[Rehearsal]:
    """Build each. SpellError where weights are not covered."""
    # Who sends tokens to experts, where activations lie and whose layers compute in which precision changes no
    # parameter; without a GPU none of that can be.
    without: dict[str, Any] = {"dispatcher": "alltoall", "offload_layers": 0, "spec": "torch", "fp8": "off"}
    plain = [replace(job, policy=replace(job.policy, **without)) for job in jobs]
    try:
        done = subprocess.run(
            python("spell_megatron.tools.plan.rehearsal"),
            input=_BUILDS.dump_json(plain).decode(),
            capture_output=True,
            text=True,
            timeout=_SECONDS_PER_JOB * len(jobs),
            env={**environment(), "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""},
        )
    except subprocess.TimeoutExpired:
        raise SpellError(
            f"building the model took longer than {_SECONDS_PER_JOB} s; is the machine busy?"
        ) from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise SpellError(f"the model of this recipe cannot be built:\n{done.stderr.strip()[-3000:]}")
    answers = json.loads(lines[-1])
    if "fault" in answers:
        raise SpellError(answers["fault"])
    return [
        Rehearsal([Rank(**rank) for rank in a["ranks"]], a["hf_weights"], a["hf_parameters"])
        for a in answers["rehearsals"]
    ]


# Everything below runs in the process of the rehearsal.


def _build(job: Build) -> Rehearsal:
    from spell_megatron.policy.layout import check_policy
    from spell_megatron.weights.shape import model_shape
    from spell_megatron.weights.table import EMBEDDING

    policy, size = job.policy, job.size
    shape, layout = model_shape(job.folder, job.families), policy.layout
    check_policy(policy, shape, size)
    per_stage = size // layout.pipeline
    ranks: list[Rank] = []
    covered: Counter[str] = Counter()
    full = _hf_shapes(job.folder, shape.family)
    for stage in range(layout.pipeline):
        # Megatron numbers ranks by tensor, context, data, then pipeline: a stage's ranks are consecutive.
        pair = []
        for rank in dict.fromkeys((stage * per_stage, (stage + 1) * per_stage - 1)):
            with _world(policy, rank, size):
                built, names = _inspect(policy, job.folder, shape, rank, stage, full)
            pair.append(built)
        if any(other.shapes != pair[0].shapes for other in pair):
            raise SpellError(f"ranks of pipeline stage {stage} differ in shape: {[p.rank for p in pair]}")
        covered.update(names)
        ranks += pair
    embedding = set(shape.family.known.names(EMBEDDING))
    _check_covered(covered, full, copies=embedding if shape.tied and layout.pipeline > 1 else set())
    return Rehearsal(ranks, len(full), sum(_numel(s) for s in full.values()))


@contextmanager
def _world(policy: PolicyConfig, rank: int, size: int) -> Iterator[None]:
    """This process as one rank of a world of which nothing else exists."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from spell_megatron.policy.world import start_world, stop_world

    create = mpu.create_group
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    mpu.create_group = lambda *args, **kwargs: create(*args, **{**kwargs, "backend": None})  # gloo is real
    try:
        start_world(policy.layout, seed=0, timeout_seconds=60)
        device, torch.cuda.current_device = torch.cuda.current_device, lambda: torch.device("meta")  # type: ignore
        try:
            yield
        finally:
            torch.cuda.current_device = device
    finally:
        mpu.create_group = create
        stop_world()


def _inspect(
    policy: PolicyConfig,
    folder: Path,
    shape: ModelShape,
    rank: int,
    stage: int,
    full: dict[str, tuple[int, ...]],
) -> tuple[Rank, list[str]]:
    from spell_megatron.policy.model import build_chunks
    from spell_megatron.policy.optimizer import wrap_data_parallel
    from spell_megatron.weights.names import weights_of

    chunks = build_chunks(policy, shape, folder)
    models = wrap_data_parallel(chunks, policy.optimizer)
    parameters = {f"{i}.{n}": p for i, chunk in enumerate(chunks) for n, p in chunk.named_parameters()}
    expert = sum(p.numel() for p in parameters.values() if not getattr(p, "allreduce", True))
    weights = weights_of(chunks, shape.family.known, shape.tied)  # as transformers names them
    names = [name for weight in weights for name in _covers(weight, policy, shape.experts, full)]
    built = Rank(
        rank=rank,
        stage=stage,
        dense=sum(p.numel() for p in parameters.values()) - expert,
        expert=expert,
        weights=_storage_bytes(parameters.values()),
        gradients=_storage_bytes(p.main_grad for p in parameters.values() if p.requires_grad),
        optimizer=_optimizer_bytes(policy, models, parameters.values()),
        shapes={name: list(p.shape) for name, p in parameters.items()},
    )
    return built, names


def _covers(
    weight: Any, policy: PolicyConfig, experts: int, full: dict[str, tuple[int, ...]]
) -> Iterator[str]:
    """Hugging Face tensors that the ranks which share a stage hold together in this parameter.

    Raises SpellError where the parts do not tile the tensor exactly.
    """
    from spell_megatron.weights.table import Split

    layout = policy.layout
    pieces = layout.tensor if weight.expert is None else layout.expert_tensor
    local = tuple(weight.parameter.shape)
    names = [weight.hf_names]
    if weight.expert is not None:
        per_rank = experts // layout.expert
        names = [
            tuple(name.format(expert=rank * per_rank + weight.expert) for name in weight.hf_names)
            for rank in range(layout.expert)
        ]
    for together in names:
        missing = [name for name in together if name not in full]
        if missing:
            raise SpellError(f"the model has no weight {missing[0]!r}")
        wholes = [full[name] for name in together]
        dimension = 1 if weight.split is Split.ROW else 0
        pieces_here = 1 if weight.split is Split.REPLICATED else pieces
        wanted = list(wholes[0])
        wanted[dimension] = sum(whole[dimension] for whole in wholes)
        tiled = list(local)
        tiled[dimension] *= pieces_here
        if tiled != wanted:
            raise SpellError(
                f"{pieces_here} parts of {list(local)} do not tile {', '.join(together)}: {wanted}"
            )
        yield from together


def _check_covered(covered: Counter[str], full: dict[str, tuple[int, ...]], copies: set[str]) -> None:
    expected = Counter([*full, *copies])
    wrong = [name for name in expected.keys() | covered.keys() if expected[name] != covered[name]]
    if wrong:
        counts = ", ".join(f"{name} ({covered[name]} times)" for name in wrong[:5])
        raise SpellError(f"{len(wrong)} weights are not covered exactly once: {counts}")


def _hf_shapes(folder: Path, family: Family) -> dict[str, tuple[int, ...]]:
    """Every weight of the Hugging Face model as its files name it, built by transformers without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from spell_megatron.weights.known import hugging_face_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hugging_face_config(folder, family))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        size = tuple(parameter.shape)
        if name.endswith("mlp.experts.gate_up_proj"):  # in memory all experts are one tensor, in files many
            experts, double, hidden = size
            for expert in range(experts):
                stem = f"{name.removesuffix('.gate_up_proj')}.{expert}"
                shapes[f"{stem}.gate_proj.weight"] = shapes[f"{stem}.up_proj.weight"] = (double // 2, hidden)
        elif name.endswith("mlp.experts.down_proj"):
            for expert in range(size[0]):
                shapes[f"{name.removesuffix('.down_proj')}.{expert}.down_proj.weight"] = size[1:]
        else:
            shapes[name] = size
    return shapes


def _numel(size: Iterable[int]) -> int:
    product = 1
    for length in size:
        product *= length
    return product


def _storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes under tensors, each storage once; Megatron's buffers come with their padding."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _optimizer_bytes(policy: PolicyConfig, models: Sequence[Any], parameters: Iterable[Any]) -> int:
    """AdamW's state on this rank: float32 master weights (where the weights are not) and two moments."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if policy.optimizer.cpu_offload:
        return 0
    state = 12 if policy.master_weights else 8
    if not policy.optimizer.distributed:
        owned: int = sum(p.numel() for p in parameters if p.requires_grad)
        return state * owned
    owned = 0
    for model in models:
        for buffer in model.buffers + model.expert_parallel_buffers:
            for buckets in DistributedOptimizer._build_gbuf_range_map(buffer).values():
                for bucket in buckets:
                    owned += sum(ranges["param"].size for ranges in bucket["param_map"].values())
    return state * owned


def main() -> None:
    import logging

    logging.disable(logging.WARNING)
    answer: dict[str, Any]
    try:
        found = [_build(job) for job in _BUILDS.validate_json(sys.stdin.read())]
        answer = {"rehearsals": [asdict(rehearsal) for rehearsal in found]}
    except SpellError as error:
        answer = {"fault": str(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
