"""THE LOOP: collect → update → resync → measure → record.

Self-play fills a batch (its advantages are token weights by then), the learner makes one update of it, the
engine gets the new weights, and the step is recorded. The same loop runs on every rank; what only rank 0
does is behind the run. With `selfplay.max_staleness` above 0 the next plays go on meanwhile, on a
thread behind it: the loop is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.config import Config
from spell_megatron.run.opening import open_run, read_run_config
from spell_megatron.run.record import RunFolder, read_metrics
from spell_megatron.run.run import Benchmarks, Judges, Run


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to. Held-out scores are `{"mean": …, "by_task": {…}}`, or None where not measured."""

    run_dir: str
    steps: int
    report: str
    heldout_before: dict[str, Any] | None
    heldout_after: dict[str, Any] | None


def train(config: Config, benchmarks: Benchmarks | None = None, judges: Judges | None = None) -> Summary:
    """Make a new run of a configuration.

    `benchmarks` is `eval.live_benchmarks`, for `heldout.benchmarks`; `judges` is `eval.reward_judge`, for
    `selfplay.external_judge`.
    """
    return _run(config, None, benchmarks, judges)


def resume(
    run: Path,
    overrides: Iterable[str] = (),
    benchmarks: Benchmarks | None = None,
    judges: Judges | None = None,
    *,
    origin: int | None = None,
) -> Summary:
    """Go on with a run after its newest whole checkpoint; overrides may lengthen it or change its layout.

    `origin` is the step of another checkpoint, 0 the very beginning; later checkpoints are set aside.
    """
    return _run(read_run_config(run, tuple(overrides)), run, benchmarks, judges, origin)


def _run(
    config: Config,
    folder: Path | None,
    benchmarks: Benchmarks | None,
    judges: Judges | None,
    origin: int | None = None,
) -> Summary:
    with open_run(config, folder, benchmarks, judges, origin=origin) as run:
        _loop(run)
        return _summary(run.folder, run.step)


def _loop(run: Run) -> None:
    run.begin()
    for step in range(run.step + 1, run.config.steps + 1):
        collected = run.collect(step)
        updated = run.update(collected)
        run.resync(step)
        scores = run.measure(step)
        run.record(collected, updated, scores)
    run.finish()


def _summary(run: RunFolder, steps: int) -> Summary:
    """First and last held-out scores as the run's metrics have them, resumed or not."""
    scores = [
        {
            "mean": row["heldout/mean"],
            "by_task": {
                key.removeprefix("heldout/"): value
                for key, value in row.items()
                if key.startswith("heldout/") and key != "heldout/mean"
            },
        }
        for row in read_metrics(run)
        if row.get("heldout/mean") is not None
    ]
    first, last = (scores[0], scores[-1]) if scores else (None, None)
    return Summary(str(run.path), steps, str(run.report), first, last)
