"""Figures of each step: as JSON lines, for TensorBoard, and for Weights & Biases where it is asked for."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from spell_megatron.run.record.folder import JsonLines, RunFolder, read_lines, replace_text, writing
from spell_megatron.types import SpellError

logger = logging.getLogger(__name__)

Row = dict[str, float | None]


class Metrics:
    """Writes one row a step.

    `after` is the step that a resumed run goes on from: rows of later steps are forgotten, since
    those steps are made again. Raises SpellError where a file cannot be written or W&B is missing.
    """

    def __init__(self, folder: RunFolder, wandb_project: str = "", after: int | None = None) -> None:
        if after is not None:
            rows = [row for row in read_lines(folder.metrics) if row.get("step", 0) <= after]
            replace_text(folder.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        self._lines = JsonLines(folder.metrics)
        self._folder = folder
        with writing(folder.tensorboard):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(folder.tensorboard), purge_step=None if after is None else after + 1
            )
        self._wandb = _wandb_run(wandb_project, folder) if wandb_project else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the figures of a step, durably. What is not finite is written as null."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):
            logger.warning("step %d: not finite: %s", step, ", ".join(sorted(values.keys() - finite.keys())))
        row = {name: finite.get(name) for name in values}
        self._lines.append({"step": step, "time": round(time.time(), 3), **row})
        self._lines.sync()
        with writing(self._folder.tensorboard):
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **finite})

    def close(self) -> None:
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: RunFolder) -> list[Row]:
    """One row a step, in order; where a step was recorded twice, its last row."""
    rows = {row["step"]: row for row in read_lines(folder.metrics) if isinstance(row.get("step"), int)}
    return [rows[step] for step in sorted(rows)]


def _wandb_run(project: str, folder: RunFolder) -> Any:
    try:
        import wandb
    except ImportError:
        raise SpellError(
            f"record.wandb={project} needs Weights & Biases: pip install wandb, or set record.wandb="
        ) from None
    name = folder.path.name
    try:
        run = wandb.init(project=project, name=name, id=name, dir=str(folder.path), resume="allow")
    except wandb.errors.Error as error:
        raise SpellError(f"Weights & Biases refuses the run: {error}; log in, or set record.wandb=") from None
    # By its own count it would drop every step that a resumed run makes again.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
