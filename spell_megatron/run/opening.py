"""How a run begins on every rank: the world, the folder and its lock, then the parts of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from spell_megatron.base.ownership import private
from spell_megatron.base.pulse import working
from spell_megatron.base.secret import read_secret
from spell_megatron.config import Config, ConfigError, dump_config, load_config, untrainable
from spell_megatron.policy.waiting import MainRank
from spell_megatron.policy.world import start_world, stop_world
from spell_megatron.rollout.experts import check_replay
from spell_megatron.run.preemption import listen
from spell_megatron.run.record import RunFolder, RunLock, forget_stale, locked
from spell_megatron.run.run import Benchmarks, Judges, Run
from spell_megatron.selfplay import prompts_of
from spell_megatron.types import SpellError


@contextmanager
def open_run(
    config: Config,
    run: Path | None,
    benchmarks: Benchmarks | None = None,
    judges: Judges | None = None,
    *,
    origin: int | None = None,
) -> Iterator[Run]:
    """A run in the folder `run`, resumed from its newest checkpoint; in a new folder where None.

    `origin` is another step to go on from, 0 the very beginning; what is later is set aside.
    `benchmarks` makes what measures `heldout.benchmarks` (`eval.live_benchmarks`; this room does not know it), and
    `judges` the judge of `selfplay.external_judge` (`eval.reward_judge`).
    """
    if config.selfplay.external_judge.url and judges is None:
        raise SpellError("selfplay.external_judge: pass eval.reward_judge, or train by the command line")
    if config.heldout.benchmarks and benchmarks is None:
        raise SpellError("heldout.benchmarks: pass eval.live_benchmarks, or train by the command line")
    if fault := untrainable(config):
        raise ConfigError(fault)
    check_replay(config)
    prompts_of(config)  # a template that cannot be used is named before anything is loaded
    policy = config.policy
    with working("waiting for the other ranks") if os.environ.get("RANK", "0") == "0" else nullcontext():
        world = start_world(
            policy.layout, seed=config.seed, timeout_seconds=policy.timeout_seconds, secret=_secret(run)
        )
    with ExitStack() as stack:
        stack.callback(stop_world)
        main = stack.enter_context(MainRank(world))
        with main.announced():
            stack.enter_context(private(config.record.group_readable))
            before = read_run_config(run) if run else config
            if run is None:
                run = main.work(
                    "makes the run folder", lambda: RunFolder.create(config.runs, config.name).path
                )
            folder = RunFolder(run)
            lock = _locked(folder, main, stack)
            if world.is_main:
                folder.close_to_others(config.record.group_readable)
                folder.save_config(dump_config(before))
            opened = Run(config, folder, world, main, stack, benchmarks, judges, origin=origin, lock=lock)
            if world.is_main:
                forget_stale(folder, opened.step, before, config, anew=origin is not None)
                # Now that no episode of the one before is left to go on with.
                folder.save_config(dump_config(folder.lasting(config, before)))
            yield opened


def _secret(run: Path | None) -> str:
    """What the ranks of a launched run know each other by; a run without a launcher has none."""
    file = RunFolder(run).secret if run else None
    return read_secret(file) if file and file.exists() else ""


def _locked(folder: RunFolder, main: MainRank, stack: ExitStack) -> RunLock | None:
    """Rank 0's lock of the run folder, whose loss ends the run. Raises SpellError, on every rank, where it cannot be
    had."""
    held: list[RunLock] = []
    stop = listen()

    def lock() -> SpellError | None:
        try:
            held.append(stack.enter_context(locked(folder.path, lambda: stop.ask("the loss of its lock"))))
        except SpellError as error:
            return error
        return None

    if (fault := main.work("locks the run folder", lock)) is not None:
        raise fault
    return held[0] if held else None


def read_run_config(run: Path, overrides: tuple[str, ...] = ()) -> Config:
    """The configuration of an existing run."""
    return load_config(str(RunFolder.open(run).config), overrides)
