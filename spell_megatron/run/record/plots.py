"""Figures of a run as SVG that takes its colours from the page, so that light, dark and print all suit it.

Every figure is a function of the rows of metrics.jsonl and is None where its metrics are missing.
Drawing goes through matplotlib's object interface: no display, no global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from spell_megatron.base.terminal import label
from spell_megatron.selfplay.roles import ROLES
from spell_megatron.selfplay.tasks import TASKS

Rows = Sequence[Mapping[str, float | None]]
Series = tuple[np.ndarray, np.ndarray]
Draw = Callable[[Rows], str | None]
"""A figure, as a function of the rows."""

INK, MUTED, GRID, PAPER = "#1d2126", "#6c747d", "#e3e5e8", "#fefefd"
BLUE, AMBER, TEAL, RED, PLUM = "#3767a8", "#c97a1f", "#26897c", "#b84a45", "#83599b"
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper",
    BLUE: "blue", AMBER: "amber", TEAL: "teal", RED: "red", PLUM: "plum",
}  # fmt: skip
"""Each colour stands for a CSS variable of the report's template."""

PALETTE = (BLUE, AMBER, TEAL, PLUM, RED, MUTED)
PHASES = {"play": BLUE, "update": AMBER, "resync": TEAL, "measure": PLUM, "record": MUTED}

_LEVELS = {
    "unsolved": "none right",
    "0_25": "to ¼",
    "25_50": "¼ to ½",
    "50_75": "½ to ¾",
    "75_100": "from ¾",
    "solved": "all right",
}
_OUTCOMES = {"zero_variance": "no variance", "bad_ground": "ungrounded", "bad_format": "bad format"}

POINTS = 240
"""Longer series are averaged into this many points."""
COLUMNS = 60
"""Columns of the heat map and of stacked bars."""
_SIZE = (5.4, 2.7)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def series(rows: Rows, name: str) -> Series | None:
    """Steps and values of one metric; None where it was never measured."""
    points = [(row["step"], value) for row in rows if (value := row.get(name)) is not None]
    if not points:
        return None
    steps, values = np.array(points, dtype=float).T
    return steps, values


def names_under(rows: Rows, prefix: str) -> list[str]:
    """Last parts of the metrics `prefix/…`, in the order of their first appearance."""
    found = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix + "/"))
    return [name.removeprefix(prefix + "/") for name in found]


def _averaged(values: np.ndarray, most: int) -> np.ndarray:
    """`values` [..., n] averaged along the last axis into at most `most` columns."""
    size = -(-values.shape[-1] // most)
    groups = np.array_split(np.arange(values.shape[-1]), -(-values.shape[-1] // size))
    return np.stack([values[..., group].mean(axis=-1) for group in groups], axis=-1)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of a centred window of a tenth of the run; the window shrinks at the ends."""
    reach = len(values) // 20
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def _figure(draw: Callable[[Axes], None], size: tuple[float, float] = _SIZE) -> str:
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "spell"}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.margins(x=0.02)
        draw(axes)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an inline SVG element."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="plot" viewBox="\1">', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the columns that stand at `steps` [n]: [n + 1]."""
    gaps = np.diff(steps) if len(steps) > 1 else np.ones(1)
    return np.array([steps[0] - gaps[0] / 2, *((steps[1:] + steps[:-1]) / 2), steps[-1] + gaps[-1] / 2])


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step", loc="right", fontsize=8)


def _end_labels(axes: Axes, labels: list[tuple[str, float, str]]) -> None:
    """Names of lines at their right ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    scale = axes.transData
    spots = sorted((float(scale.transform((1, value))[1]), name, colour) for name, value, colour in labels)
    bottom, top = (float(scale.transform((1, y))[1]) for y in (low, high))
    gap = (top - bottom) * 0.085
    heights: list[float] = []
    for height, _, _ in spots:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    over = max(0.0, heights[-1] - top) if heights else 0.0
    for height, (_, name, colour) in zip(heights, spots, strict=True):
        place = (height - over - bottom) / (top - bottom)
        axes.annotate(
            name,
            (1.015, place),
            xycoords="axes fraction",
            color=colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )


def lines(
    wanted: Mapping[str, tuple[str, str]],
    *,
    percent: bool = False,
    rare: bool = False,
    log: bool = False,
    zero: bool = False,
) -> Draw:
    """A figure of lines: `wanted` maps a metric to its label and colour.

    `percent` shows 0 to 100 %, with `rare` as much of it as is needed; `zero` lets the axis start at 0.
    """

    def make(rows: Rows) -> str | None:
        found = [(points, *wanted[name]) for name in wanted if (points := series(rows, name)) is not None]
        if log:
            found = [((s[v > 0], v[v > 0]), name, colour) for (s, v), name, colour in found if (v > 0).any()]
        return _figure(lambda axes: draw(axes, found)) if found else None

    def draw(axes: Axes, found: list[tuple[Series, str, str]]) -> None:
        ends = []
        for points, name, colour in found:
            steps, values = _averaged(points[0], POINTS), _averaged(points[1], POINTS)
            smooth = np.exp(_smooth(np.log(values))) if log else _smooth(values)
            if len(steps) >= 20:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, smooth, color=colour, marker="o" if len(steps) < 8 else None, markersize=4)
            ends.append((label(name), float(smooth[-1]), colour))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_locator(NullLocator())
        elif percent:
            top = min(1.0, max(0.1, 1.15 * axes.get_ylim()[1])) if rare else 1.0
            axes.set_ylim(-0.02 * top, 1.02 * top)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            if zero:
                axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        _step_axis(axes)
        if len(ends) > 1:
            _end_labels(axes, ends)

    return make


def _number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def stack(prefix: str, colours: Mapping[str, str], *, share: bool) -> Draw:
    """Bars on bars: what a step consists of. Unknown parts get muted tones."""

    def make(rows: Rows) -> str | None:
        parts = names_under(rows, prefix)
        parts = [name for name in colours if name in parts] + sorted(set(parts) - set(colours) - {"total"})
        if not parts:
            return None
        rows = [row for row in rows if any(row.get(f"{prefix}/{part}") is not None for part in parts)]
        table = np.array([[row.get(f"{prefix}/{part}") or 0.0 for row in rows] for part in parts])
        steps = np.array([row["step"] for row in rows], dtype=float)
        if not table.sum():
            return None
        return _figure(lambda axes: draw(axes, parts, steps, table))

    def draw(axes: Axes, parts: list[str], steps: np.ndarray, table: np.ndarray) -> None:
        steps, table = _averaged(steps, COLUMNS), _averaged(table, COLUMNS)
        if share:
            table = table / np.maximum(table.sum(axis=0), 1e-12)
        edges = _edges(steps)
        widths = np.diff(edges) * 0.94
        base = np.zeros(len(steps))
        others = 0
        for part, values in zip(parts, table, strict=True):
            others += part not in colours
            alpha = 0.85 if part in colours else max(0.25, 0.85 - 0.2 * others)
            name = label(_OUTCOMES.get(part, part.replace("_", " ")))
            colour = colours.get(part, MUTED)
            axes.bar(
                edges[:-1],
                values,
                widths,
                base,
                align="edge",
                color=colour,
                alpha=alpha,
                linewidth=0,
                label=name,
            )
            base += values
        if share:
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlim(edges[0], edges[-1])
        _step_axis(axes)
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            fontsize=8,
            handlelength=0.8,
            handleheight=0.8,
            labelcolor=MUTED,
            reverse=True,
            borderaxespad=0.3,
        )

    return make


def change(prefix: str) -> Draw:
    """Before and after, a row a task or another name of the metrics `prefix/…`, their mean first."""
    return lambda rows: _change(rows, prefix)


def _change(rows: Rows, prefix: str) -> str | None:
    tasks = _coloured(names_under(rows, prefix), TASKS)
    measured = {name: series(rows, f"{prefix}/{name}") for name in ("mean", *tasks)}
    ends = {
        name: (points[1][0], points[1][-1])
        for name, points in measured.items()
        if points and len(points[0]) > 1
    }
    if not ends:
        return None

    def draw(axes: Axes) -> None:
        for place, (name, (before, after)) in enumerate(ends.items()):
            colour = tasks.get(name, INK)
            axes.plot([before, after], [place, place], color=colour, linewidth=3, alpha=0.35)
            axes.plot(
                before, place, "o", color=colour, markerfacecolor=PAPER, markersize=8, markeredgewidth=1.6
            )
            axes.plot(after, place, "o", color=colour, markersize=8)
            for value, side in ((min(before, after), -1), (max(before, after), 1)):
                axes.annotate(
                    f"{value:.0%}",
                    (value, place),
                    (9 * side, 0),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="center",
                    fontsize=8.5,
                    color=MUTED,
                )
        axes.set_yticks(range(len(ends)), [task_label(name) for name in ends])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(ends) - 0.4, -0.6)
        axes.set_xlim(-0.08, 1.08)
        axes.set_xticks(np.linspace(0, 1, 5))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(False)
        axes.grid(True, axis="x")

    return _figure(draw, (_SIZE[0], 0.9 + 0.42 * len(ends)))


def difficulty(rows: Rows) -> str | None:
    """How the questions' mean responder rewards are distributed: nobody right, quarters, everybody right."""
    rows = [row for row in rows if any(row.get(f"difficulty/{name}") is not None for name in _LEVELS)]
    if not rows:
        return None
    steps = np.array([row["step"] for row in rows], dtype=float)
    table = np.array([[row.get(f"difficulty/{name}") or 0.0 for row in rows] for name in _LEVELS])
    table = _averaged(table, COLUMNS)
    table /= max(table.max(), 1e-12)
    edges = _edges(_averaged(steps, COLUMNS))

    def draw(axes: Axes) -> None:
        cells, colours = [], []
        for level, column in np.argwhere(table > 0):
            left, right = edges[column], edges[column + 1]
            cells.append([(left, level), (right, level), (right, level + 1), (left, level + 1)])
            colours.append(matplotlib.colors.to_rgba(BLUE, 0.04 + 0.92 * float(table[level, column])))
        axes.add_collection(PolyCollection(cells, facecolors=colours, linewidths=0, gid="heat"))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, len(_LEVELS))
        axes.grid(False)
        axes.set_yticks(np.arange(len(_LEVELS)) + 0.5, list(_LEVELS.values()))
        _step_axis(axes)

    return _figure(draw)


def one(metric: str, colour: str = BLUE, *, percent: bool = False, zero: bool = True) -> Draw:
    return lines({metric: ("", colour)}, percent=percent, zero=zero)


def each(prefix: str) -> Draw:
    """A line for every metric `prefix/…`, those of tasks first."""

    def make(rows: Rows) -> str | None:
        colours = _coloured(names_under(rows, prefix), TASKS)
        wanted = {f"{prefix}/{name}": (task_label(name), colour) for name, colour in colours.items()}
        return lines(wanted, zero=True)(rows)

    return make


def roles(metric: str, *, percent: bool = False, rare: bool = False) -> Draw:
    """The same metric of every role that has it."""

    def make(rows: Rows) -> str | None:
        found = {name.removesuffix(f"/{metric}") for row in rows for name in row if name.count("/") == 1}
        spoke = [role for role in found if any(f"{role}/length" in row for row in rows)]
        wanted = {f"{role}/{metric}": (role, colour) for role, colour in _coloured(spoke, ROLES).items()}
        return lines(wanted, percent=percent, rare=rare, zero=True)(rows)

    return make


def task_label(name: str) -> str:
    """A task in words; one that is not known here by its name."""
    return TASKS[name].label if name in TASKS else name


def _coloured(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """A colour for each name but the mean's: first of those that are known, in their order, then of the others."""
    order = [*known, *sorted(set(names) - set(known) - {"mean"})]
    colours = dict(zip(order, cycle(PALETTE), strict=False))
    return {name: colours[name] for name in order if name in set(names)}


def heldout_curve(rows: Rows) -> str | None:
    measured = series(rows, "heldout/mean")
    if measured is None or len(measured[0]) < 3:
        return None
    tasks = _coloured(names_under(rows, "heldout"), TASKS)
    wanted = {f"heldout/{task}": (task_label(task), colour) for task, colour in tasks.items()}
    return lines(wanted | {"heldout/mean": ("mean", INK)}, percent=True)(rows)
