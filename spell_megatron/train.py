"""THE LOOP: play → advantage → update → resync → record.

Self-play fills a batch (its advantages are token weights by then), the learner makes one update of it, the
engine gets the new weights, and the step is recorded. Everything else is a part of the `Session`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spell_megatron.config import Config, load_config
from spell_megatron.record import RunFolder, read_metrics
from spell_megatron.selfplay import StarvedError
from spell_megatron.session import Session, open_session


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


def train(config: Config) -> Summary:
    """Make a new run of a configuration."""
    return _run(config, RunFolder.create(config.runs, config.name))


def resume(folder: Path, overrides: Iterable[str] = ()) -> Summary:
    """Go on with a run after its newest whole checkpoint; overrides may lengthen it or change its layout."""
    run = RunFolder.open(folder)
    return _run(load_config(str(run.config), overrides), run)


def _run(config: Config, run: RunFolder) -> Summary:
    with open_session(config, run) as session:
        return asyncio.run(_loop(session))


async def _loop(session: Session) -> Summary:
    steps = session.config.steps
    if session.step == 0:
        session.start(await session.measure(0, force=True))
    for step in range(session.step + 1, steps + 1):
        try:
            play = await session.play(step)
        except StarvedError:
            session.save_starved()
            raise
        update = session.update(session.share(play))
        session.resync(step)
        score = await session.measure(step, force=step == steps)
        session.record(step, play, update, score)
    session.finish()
    return _summary(session.run, session.step)


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
