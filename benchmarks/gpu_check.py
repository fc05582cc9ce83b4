"""The first hour on a GPU in ten minutes: whether what a CPU cannot prove holds here, and how fast it is.

    make gpu-check                                    # all of it, and docs/gpu.md where there is a GPU
    python -m benchmarks.gpu_check --only engine      # one part
    python -m benchmarks.gpu_check --graphs           # engines with compilation and CUDA graphs, not eagerly

Each part is a process of its own with a time limit, and each of its checks says what became of it as soon as that is
known: whatever fails, hangs or crashes, the rest goes on. Without a GPU all of it runs on the CPU, with a small model.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import gpu
from benchmarks.checks import Check, Figures, Row, follow, markdown, report, table
from benchmarks.common import EXPERTS, random_group, save_model
from benchmarks.device import PEAK, device_name, random_model
from benchmarks.layers import layer_classes
from benchmarks.switches import BASE, settings, try_step
from spell_megatron.base.placement import Phase, Placement
from spell_megatron.config import (
    Dtype,
    LayoutConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    ServersConfig,
    load_config,
)
from spell_megatron.policy.colocation import LearnerOffload
from spell_megatron.policy.learner import Learner
from spell_megatron.policy.mismatch import mismatch
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.rollout.colocation import EngineOffload
from spell_megatron.rollout.engine import WeightsWanted
from spell_megatron.rollout.fleet import Fleet
from spell_megatron.run.record import RunFolder, read_metrics
from spell_megatron.run.train import train
from spell_megatron.tools.doctor import examine
from spell_megatron.types import Group, Sample, SpellError, TrainBatch

CUDA = torch.cuda.is_available()
GIB = 2**30
_WIDTH = 150
_SHALLOW = {"num_hidden_layers": 2}
_NARROW = {**_SHALLOW, "hidden_size": 128}
"""Models that a CPU computes in bfloat16, which takes it long."""
_MOMENT = 0.1
"""Seconds from a request to the death of who answers it."""
_BOUNDS: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.02}
"""Mean difference of log-probs that numerics explain, in nats. Those of old weights differ by far more."""


def installation(scratch: Path, graphs: bool) -> Iterator[Check]:
    """`spell-megatron doctor`."""

    def doctor() -> Figures:
        findings = examine()
        findings.check()
        return {part.part: part.found for part in findings.parts if part.state == "ok"}

    yield "doctor", doctor


def engine(scratch: Path, graphs: bool) -> Iterator[Check]:
    """Trainer and server on one device: memory that is given back, weights that arrive, a server that is killed."""
    pair = _Pair(scratch, graphs)
    try:
        yield "a server starts beside the trainer", pair.start
        yield "sleep and wake", pair.sleep
        yield "three updates reach it", pair.resync
        yield "killed while it answers", pair.killed
    finally:
        pair.close()


class _Pair:
    """A learner, and a server that takes turns with it in the memory of one device."""

    def __init__(self, scratch: Path, graphs: bool) -> None:
        self._scratch = scratch
        self._model = _model(scratch / "model")
        dtype: Dtype = "bfloat16" if CUDA else "float32"
        self._bound = _BOUNDS[dtype]
        policy = PolicyConfig(dtype=dtype, stream_tokens=4096, optimizer=OptimizerConfig(lr=1e-2))
        self._learner = Learner(policy, self._model, start_world(LayoutConfig(), seed=0, timeout_seconds=300))
        self._settings = RolloutConfig(
            dtype=dtype,
            max_model_len=1024,
            max_num_seqs=32,
            max_batched_tokens=2048,
            kv_cache_mib=None if CUDA else 32,
            gpu_memory=0.5,
            eager=not graphs,
            placement="colocated",
            servers=ServersConfig(count=1, verify="checksum", start_seconds=180, sync_seconds=60),
        )
        self._placement = Placement()
        self._placement.admit(LearnerOffload(self._learner))
        self._placement.enter(Phase.BUILD)
        self._fleet: Fleet | None = None

    def start(self) -> Figures:
        free = _free()
        fleet = Fleet(
            self._model, self._settings, scratch=self._scratch / "vllm", logs=self._scratch / "logs", stop=()
        )
        self._fleet = fleet
        self._placement.admit(EngineOffload(fleet))
        return {"GiB taken": (free - _free()) / GIB, "mean gap": self._agree(self._sampled())}

    def sleep(self) -> Figures:
        self._placement.enter(Phase.GENERATE)
        awake = _free()
        self._placement.enter(Phase.SAVE)
        asleep = _free()
        gap = self._agree(self._sampled())
        return {"GiB free": awake / GIB, "GiB free, trainer in its place": asleep / GIB, "mean gap": gap}

    def resync(self) -> Figures:
        assert self._fleet is not None, "it did not start"
        seconds, gaps, stale = [], [], []
        batch = self._sampled()
        for version in (1, 2, 3):
            self._placement.enter(Phase.UPDATE)
            self._learner.update(batch)
            stale.append(self._gap(batch))
            self._placement.enter(Phase.RESYNC)
            began = time.monotonic()
            self._fleet.update_weights(self._learner.weights(), version)
            seconds.append(time.monotonic() - began)
            batch = self._sampled()
            gaps.append(self._agree(batch))
        if not min(stale) > self._bound:
            raise SpellError(f"an update changed log-probs by {min(stale):.2g} nats: too little to tell")
        return {
            "s, first": seconds[0],
            "s, last": seconds[-1],
            "mean gap": max(gaps),
            "before a resync": min(stale),
        }

    def killed(self) -> Figures:
        assert self._fleet is not None, "it did not start"
        (group,) = self._fleet.process_groups().values()
        began = time.monotonic()
        batch = self._sampled(lambda: os.killpg(group, signal.SIGKILL))
        seconds = time.monotonic() - began
        if group in self._fleet.process_groups().values():
            raise SpellError("the server answered all before it was killed")
        return {"s until answered": seconds, "version": self._fleet.version, "mean gap": self._agree(batch)}

    def close(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
        stop_world()

    def _sampled(self, meanwhile: Callable[[], None] | None = None) -> TrainBatch:
        """Groups by the present weights; what is to happen meanwhile comes a moment after they were asked for."""
        fleet = self._fleet
        assert fleet is not None, "it did not start"
        self._placement.enter(Phase.GENERATE)

        async def group(number: int) -> Group:
            prompt = random_group(64 + number, 1, 1).prompt
            seeds = range(4 * number, 4 * number + 4)
            rollouts = await fleet.generate(prompt, seeds=seeds, max_tokens=64, temperature=1.0, top_p=1.0)
            return Group(
                prompt,
                tuple(
                    Sample(r.tokens, [(-1.0) ** i] * len(r.tokens), r.logprobs)
                    for i, r in enumerate(rollouts)
                ),
            )

        async def groups() -> TrainBatch:
            if meanwhile is not None:
                asyncio.get_running_loop().call_later(_MOMENT, meanwhile)
            return TrainBatch(tuple(await asyncio.gather(*map(group, range(4)))))

        try:
            return asyncio.run(groups())
        except WeightsWanted:  # it was started again, and nobody kept them
            self._placement.enter(Phase.RESYNC)
            fleet.update_weights(self._learner.weights(), fleet.version)
            return self._sampled()

    def _agree(self, batch: TrainBatch) -> float:
        gap = self._gap(batch)
        if not gap <= self._bound:
            raise SpellError(
                f"log-probs of engine and learner differ by {gap:.2g} nats, beyond {self._bound}"
            )
        return gap

    def _gap(self, batch: TrainBatch) -> float:
        self._placement.enter(Phase.SAVE)
        return mismatch(batch, self._learner.score(batch), ["all"] * len(batch.groups), 0)["mismatch/mean"]


def loop(scratch: Path, graphs: bool) -> Iterator[Check]:
    """Three steps of the toy recipe with trainer and server on the same device."""
    small = ("selfplay.questions=4", "selfplay.group_size=4", "heldout.questions=9", "heldout.samples=2")

    def toy() -> Figures:
        overrides = (
            "steps=3",
            f"runs={scratch}",
            "rollout.placement=colocated",
            "rollout.servers.count=1",
            f"rollout.eager={str(not graphs).lower()}",
            *(() if CUDA else small),
        )
        summary = train(load_config("toy", overrides))
        rows = read_metrics(RunFolder(Path(summary.run_dir)))[1:]
        return {
            "mismatch, mean": max(row["mismatch/mean"] or 0.0 for row in rows),
            "seconds of a step": sum(v or 0.0 for name, v in rows[-1].items() if name.startswith("time/")),
            "resync s": rows[-1]["time/resync"],
            "held-out": f"{summary.heldout_before['mean']:.3f} → {summary.heldout_after['mean']:.3f}"
            if summary.heldout_before and summary.heldout_after
            else "-",
        }

    yield "three steps of the toy recipe", toy


def numerics(scratch: Path, graphs: bool) -> Iterator[Check]:
    """bfloat16 as near to float32 as that of transformers, and float32 exact (`benchmarks.gpu precision`)."""
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=300)
    families = gpu.families(scratch) if CUDA else gpu.families(scratch, **_NARROW)

    def checked(folder: Path) -> Callable[[], Figures]:
        def precision() -> Figures:
            errors = gpu.errors_of(folder, world)
            theirs = errors.pop("transformers, bfloat16")
            for by, ours in errors.items():
                limit = {name: 1e-4 if "float32" in by else 1.5 * theirs[name] for name in _COMPARED}
                if wrong := [name for name in _COMPARED if not ours[name] <= limit[name]]:
                    raise SpellError(
                        f"{by}: {wrong[0]} is {ours[wrong[0]]:.2g}, beyond {limit[wrong[0]]:.2g}"
                    )
            return {by: found["gradients"] for by, found in errors.items()} | {
                "transformers": theirs["gradients"]
            }

        return precision

    for family, folder in families.items() if CUDA else [*families.items()][-1:]:
        yield f"gradients of {family}", checked(folder)
    stop_world()


_COMPARED = ("log-probs, mean", "gradients")


def speed(scratch: Path, graphs: bool) -> Iterator[Check]:
    """Attention, classes of layers, and steps with every switch (`benchmarks.gpu attention`, `layers`, `switches`)."""
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=300)
    lengths = (16_384, 100_000) if CUDA else (256,)
    shape = (32, 4, 128) if CUDA else (4, 2, 32)
    for length in lengths:
        yield (
            f"attention, {length} tokens",
            partial(gpu.group_attention, length, length // 32, shape, world, 3),
        )
    stop_world()
    models = ("Qwen3-4B:8", "Qwen3-30B-A3B-Instruct-2507:2") if CUDA else ("",)
    for model in models:
        yield from _layers_and_steps(model, lengths[0], scratch / model, None if model is models[-1] else 1)


def _layers_and_steps(model: str, length: int, folder: Path, most: int | None) -> Iterator[Check]:
    """Each class of layers alone; a step as recipes have it, then with every switch at its other values."""
    name, _, layers = model.rpartition(":")
    small = {**EXPERTS, **_SHALLOW}
    folder = random_model(name, int(layers), folder) if name else save_model(folder / "small", **small)
    group, policy = gpu.shared_group(length, folder), replace(BASE, stream_tokens=length)
    title = model or "a small model"
    world = start_world(LayoutConfig(), seed=0, timeout_seconds=300)
    for layer, measured in layer_classes(policy, folder, group, world, 3, PEAK):
        yield f"{layer} of {title}", measured
    stop_world()
    for switch, changed, sampled in islice(settings(policy), most):
        yield f"{title}, {switch}", partial(try_step, changed, folder, group, 1, PEAK, sampled)


@dataclass(frozen=True, slots=True)
class Part:
    """Checks that share a process, and the seconds that it may take."""

    checks: Callable[[Path, bool], Iterator[Check]]
    """Given a folder for its files, and whether engines compile and capture graphs."""
    limit: float


PARTS = {
    "installation": Part(installation, 30),
    "engine": Part(engine, 190),
    "loop": Part(loop, 160),
    "numerics": Part(numerics, 70),
    "speed": Part(speed, 150),
}


def _model(folder: Path) -> Path:
    """Random weights: four layers of a real size on a GPU, two of a small one elsewhere."""
    return random_model("Qwen3-4B", 4, folder) if CUDA else save_model(folder, **_SHALLOW)


def _free() -> int:
    """Bytes of device memory that nobody holds; 0 where there is no device."""
    return torch.cuda.mem_get_info()[0] if CUDA else 0


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; repeatable.")] = None,
    graphs: Annotated[bool, typer.Option(help="Engines with compilation and CUDA graphs.")] = False,
    write: Annotated[
        Path | None, typer.Option(help="A page for the table, written where there is a GPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")] = False,
    inside: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Make the checks; the exit code is 1 where one failed."""
    if inside:
        with tempfile.TemporaryDirectory(prefix="spell-") as scratch:
            report(PARTS[inside].checks(Path(scratch), graphs))
        return
    if unknown := set(only or ()) - PARTS.keys():
        raise typer.BadParameter(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console, rows = Console(stderr=True, width=_WIDTH), []
    for name in only or PARTS:
        limit = PARTS[name].limit if CUDA else 3 * PARTS[name].limit  # a CPU may have others to serve
        console.print(f"[bold]{name}[/] (at most {limit:.0f} s)")
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--inside", name]
        for row in follow([*command, *(["--graphs"] if graphs else [])], name, limit):
            rows.append(row)
            console.print(
                f"  {'[red]failed[/]' if row.fault else '[green]ok[/]'} {row.check}", escape(row.fault)
            )
    console.print(table(rows, f"on {device_name()}"))
    if write is not None and CUDA:
        write.write_text(_page(rows, graphs), encoding="utf-8")
    elif write is not None:
        console.print(f"there is no GPU: {write} is not written")
    if as_json:
        sys.stdout.write(json.dumps({"device": device_name(), "rows": list(map(asdict, rows))}) + "\n")
    raise typer.Exit(any(row.fault for row in rows))


def _page(rows: Sequence[Row], graphs: bool) -> str:
    lines = [
        "# On a GPU\n",
        f"`python -m benchmarks.gpu_check{' --graphs' if graphs else ''}` on {device_name()}, torch"
        f" {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}. The docstrings of `benchmarks/gpu_check.py` say what"
        " each check does.\n",
        *markdown(rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
