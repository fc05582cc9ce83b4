"""THE LOOP: play → advantage → update → resync → record.

Self-play fills a batch (its advantages are token weights by then), the learner makes one update of it, the
engine gets the new weights, and the step is recorded. The same loop runs on every rank; what only rank 0
does is behind the session. With `selfplay.max_staleness` above 0 the next plays go on meanwhile, on a
thread behind it: the loop is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spell_megatron.config import Config
from spell_megatron.record import RunFolder, read_metrics
from spell_megatron.session import Benchmarks, Judges, Session, open_session, read_run_config


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to. Held-out scores are `{"mean": …, "by_task": {…}}`, or None where not measured."""

    run_dir: str
    steps: int
    report: str
    heldout_before: dict[str, Any] | None
    heldout_after: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    run: Path | None,
    benchmarks: Benchmarks | None,
    judges: Judges | None,
    origin: int | None = None,
) -> Summary:
    with open_session(config, run, benchmarks, judges, origin=origin) as session:
        _loop(session)
        return _summary(session.run, session.step)


def _loop(session: Session) -> None:
    if session.step == 0:
        scores = session.measure(0)
        if session.driver:
            session.driver.record_start(scores)
    for step in range(session.step + 1, session.config.steps + 1):
        batch = session.play(step)
        update = session.update(batch)
        session.resync(step)
        scores = session.measure(step)
        session.record(step, update, scores)
    session.finish()


def _summary(run: RunFolder, steps: int) -> Summary:
    """First and last held-out scores as the run's metrics have them, resumed or not."""
    scores = [
        {
            "mean": row["heldout/mean"],
            "by_task": {k.removeprefix("heldout/"): v for k, v in row.items() if k.startswith("heldout/doc")},
        }
        for row in read_metrics(run)
        if row.get("heldout/mean") is not None
    ]
    first, last = (scores[0], scores[-1]) if scores else (None, None)
    return Summary(str(run.path), steps, str(run.report), first, last)
