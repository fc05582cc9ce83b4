"""The picture beside the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.results import Result
from spell_megatron.base.terminal import label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(models: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Bars of every benchmark with intervals, and pass@k beside them; one colour a model."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        _drawn(models).savefig(path, dpi=120)


def _drawn(models: Mapping[str, Sequence[Result]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    labels = list(dict.fromkeys(result.label for results in models.values() for result in results))
    width = 0.8 / max(1, len(models))
    for index, (model, results) in enumerate(models.items()):
        measured = [result for result in results if result.mean.questions]
        places = [labels.index(result.label) + index * width for result in measured]
        means = [100 * result.mean.value for result in measured]
        errors = [
            [100 * max(0.0, result.mean.value - result.mean.low) for result in measured],
            [100 * max(0.0, result.mean.high - result.mean.value) for result in measured],
        ]
        bars.bar(places, means, width, yerr=errors, capsize=2, label=label(model))
        for result in measured:
            known = {k: 100 * value for k, value in result.best_of.items() if not math.isnan(value)}
            name = result.label if len(models) == 1 else f"{result.label} ({model})"
            curves.plot(list(known), list(known.values()), marker=".", label=label(name))
    bars.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(labels))],
        [label(name) for name in labels],
        rotation=40,
        ha="right",
    )
    bars.set_ylabel("score, 95 % interval")
    curves.set_xlabel("k")
    curves.set_ylabel("pass@k, unbiased")
    for axes in (bars, curves):
        axes.set_ylim(0, 100)
        axes.grid(axis="y", alpha=0.3)
    if len(models) > 1:
        bars.legend(fontsize=7)
    if labels:
        curves.legend(fontsize=7, ncols=1 + len(labels) * len(models) // 12)
    return figure
