"""One HTML file that tells how a run went: opens offline, without scripts, from the run's folder alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from spell_megatron.base.terminal import tidy
from spell_megatron.run.record.console import PHASES
from spell_megatron.run.record.folder import RunFolder, read_lines, replace_text
from spell_megatron.run.record.metrics import Row, read_metrics
from spell_megatron.run.record.panels import sections
from spell_megatron.run.record.plots import task_label
from spell_megatron.selfplay.curriculum import widened
from spell_megatron.selfplay.episode import Episode, Response
from spell_megatron.types import SpellError

SAMPLES = 4
"""Questions shown from each end of the run."""
SEARCHED = 400
"""Episodes read in search of them, at each end."""
SHOWN_CHARACTERS = 4000
"""A longer output is cut in the middle."""


def write_report(run_dir: str | Path) -> Path:
    """Make `report.html` of a run from its folder; the path of the file.

    Raises SpellError where the folder is no run or holds no finished step.
    """
    folder = RunFolder.open(run_dir)
    rows = read_metrics(folder)
    if not rows:
        raise SpellError(f"{folder.path} has no finished step to report: metrics.jsonl is empty or missing")
    steps = folder.played_steps
    half = min(2, -(-len(steps) // 2))
    early, late = _asked(folder, steps[:half]), _asked(folder, list(reversed(steps[half:]))[:2])
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            name=folder.path.name,
            tiles=tiles(rows),
            sections=sections(rows),
            samples=[("Early", _pick(early)), ("Late", _pick(late))],
            contexts=_contexts([*late, *early]),
            table=_table(rows),
            sources=json.loads(folder.sources.read_bytes()) if folder.sources.exists() else {},
            config=folder.config.read_text(encoding="utf-8", errors="replace"),
        )
    )
    replace_text(folder.report, page)
    return folder.report


@dataclass(frozen=True, slots=True)
class Tile:
    label: str
    value: str
    detail: str = ""


def tiles(rows: list[Row]) -> list[Tile]:
    """The run in a few figures; none that were not measured."""
    made = []
    heldout = [value for row in rows if (value := row.get("heldout/mean")) is not None]
    if len(heldout) > 1:
        change = 100 * (heldout[-1] - heldout[0])
        made.append(
            Tile("Held-out accuracy", f"{heldout[0]:.0%} → {heldout[-1]:.0%}", f"{change:+.1f} points")
        )
    trained = [row for row in rows if row.get("time/play") is not None]
    if trained:
        made.append(
            Tile(
                "Steps", f"{len(trained):,}", _duration(_total(rows, *(f"time/{phase}" for phase in PHASES)))
            )
        )
    asked, kept = _total(rows, "questions"), _total(rows, "outcome/kept")
    if asked:
        made.append(Tile("Questions kept", f"{kept:,.0f}", f"of {asked:,.0f} asked"))
    if generated := _total(rows, "tokens/generated"):
        made.append(
            Tile(
                "Tokens generated", _short(generated), f"{_short(_total(rows, 'tokens/trained'))} trained on"
            )
        )
    mismatch = [value for row in rows if (value := row.get("mismatch/mean")) is not None]
    if mismatch:
        made.append(
            Tile(
                "Engine-learner mismatch", f"{sum(mismatch) / len(mismatch):.1e}", "mean log-prob difference"
            )
        )
    return made


def _total(rows: list[Row], *names: str) -> float:
    return sum(row.get(name) or 0.0 for row in rows for name in names)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _table(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """Every metric: first, last, least and greatest value."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "time"))
    table = []
    for name in sorted(names):
        values = [value for row in rows if (value := row.get(name)) is not None]
        if values:
            table.append(
                (name, [f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values))])
            )
    return table


def _asked(folder: RunFolder, steps: Iterable[int]) -> list[Episode]:
    """Episodes with a question, the first ones of some steps."""
    records = (row for step in steps for path in folder.rollout_files(step) for row in read_lines(path))
    return [episode for row in islice(records, SEARCHED) if (episode := Episode.from_dict(row)).question]


def _contexts(episodes: Sequence[Episode]) -> list[tuple[Episode, list[tuple[str, tuple[int, ...]]]]]:
    """The contexts that memory widened most, of a cluster and task one each: the questions, and what each brought."""
    widest: dict[tuple[str, str], Episode] = {}
    for episode in sorted(episodes, key=lambda e: (len(e.history), len(e.documents)), reverse=True):
        if episode.history and episode.documents:
            widest.setdefault((episode.task, episode.cluster), episode)
    return [
        (
            episode,
            [
                (entry.question.text if entry else "", documents)
                for entry, documents in widened(episode.documents, episode.history)
            ],
        )
        for episode in islice(widest.values(), SAMPLES)
    ]


def _pick(episodes: Sequence[Episode]) -> list[Episode]:
    """Episodes worth reading: tasks in turn, kept ones first, long histories first."""
    best = sorted(episodes, key=lambda e: (not e.kept, -len(e.history), e.step, e.round, e.index))
    by_task: dict[str, list[Episode]] = {}
    for episode in best:
        by_task.setdefault(episode.task, []).append(episode)
    turns = [
        queue[turn] for turn in range(SAMPLES) for _, queue in sorted(by_task.items()) if turn < len(queue)
    ]
    return turns[:SAMPLES]


def _telling(episode: Episode) -> list[Response]:
    """The best and the worst response; one where they earned the same."""
    ordered = sorted(episode.responses, key=lambda response: -response.reward)
    return ordered[:1] if ordered[0].reward == ordered[-1].reward else [ordered[0], ordered[-1]]


def _bounded(text: str) -> str:
    """Model output for a page."""
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
    return text


def _shown(value: Any) -> Any:
    """Whatever the page says, in characters that can be read; what was made here is as it is."""
    return tidy(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def page_environment() -> Environment:
    """Templates of pages that show model output: everything is escaped."""
    environment = Environment(
        loader=PackageLoader("spell_megatron.run.record", "."),
        autoescape=select_autoescape(("html", "j2")),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "bounded": _bounded,
        "telling": _telling,
        "task": task_label,
    }
    return environment
