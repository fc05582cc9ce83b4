"""The tables: JSON for machines, Markdown for people, one plot; and several checkpoints side by side."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.benchmark import Benchmark
from eval.runner import Plan
from eval.scoring import Sample
from eval.statistics import Difference, Figure, figure, mean_pass, paired, pass_at_k, pass_at_k_bootstrap


@dataclass
class Result:
    """One benchmark at one limit. Scores are in [0, 1]; tables show them times 100.

    `best_of[k]` is pass@k, unbiased; `best_of_bootstrap[k]` is the release's estimate of it. `subsets`
    has a figure a value of every label, `macro` the unweighted mean of a label's values. `bounds` is where the mean would lie if every missing or unjudged sample were wrong, or right.
    """

    benchmark: str
    title: str
    max_input: int | None
    scoring: str
    mean: Figure
    rule: Figure
    bounds: tuple[float, float]
    best_of: dict[int, float]
    best_of_bootstrap: dict[int, float]
    subsets: dict[str, dict[str, Figure]]
    macro: dict[str, Figure]
    metrics: dict[str, float]
    counts: dict[str, int]
    problems: dict[str, int]
    questions: dict[str, float] = field(repr=False)

    @property
    def label(self) -> str:
        return self.title if self.max_input is None else f"{self.title} @ {self.max_input}"

    @property
    def complete(self) -> bool:
        """Every sample was answered and scored."""
        return self.counts["scored"] == self.counts["asked"]


@dataclass
class Report:
    """Everything that was measured of one model."""

    model: str
    settings: dict[str, Any]
    results: list[Result]
    overall: dict[str, Figure]

    @property
    def complete(self) -> bool:
        return bool(self.results) and all(result.complete for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """JSON values only; a figure that does not exist is null."""
        return _plain({**asdict(self), "complete": self.complete})

    def write(self, folder: Path) -> None:
        """`report.json`, `report.md` and `report.png` below `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(
            json.dumps(self.to_json(), indent=1, ensure_ascii=False), encoding="utf-8"
        )
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        plot([self], folder / "report.png")

    def markdown(self) -> str:
        return "\n".join([f"# {self.model}", "", *_main_table(self), *_overall(self), *_details(self)]) + "\n"


def summarise(
    plan: Plan, samples: Sequence[Sample], per_question: int, skipped: int, judge_name: str
) -> Result:
    """Figures of one plan. `per_question` is how many samples each question should have."""
    scored = [sample for sample in samples if sample.score is not None]
    questions = _by_question(scored)
    means = {item: sum(scores) / len(scores) for item, scores in questions.items()}
    rule_means = {item: sum(s) / len(s) for item, s in _by_question(samples, rule=True).items()}
    labels = {sample.item: sample.labels for sample in samples}
    asked = (len(plan.items) - skipped) * per_question
    ks = range(1, per_question + 1)
    return Result(
        benchmark=plan.benchmark.name,
        title=plan.benchmark.title,
        max_input=plan.max_input,
        scoring=_scoring(plan.benchmark, judge_name),
        mean=_figure(plan.benchmark, means, labels),
        rule=_figure(plan.benchmark, rule_means, labels),
        bounds=_bounds(means, questions, asked, per_question),
        best_of={k: mean_pass(list(questions.values()), k, pass_at_k) for k in ks},
        best_of_bootstrap={k: mean_pass(list(questions.values()), k, pass_at_k_bootstrap) for k in ks},
        subsets=_subsets(means, labels),
        macro=_macro(means, labels),
        metrics=_metrics(samples),
        counts={
            "questions": len(plan.items),
            "asked": asked,
            "answered": len(samples),
            "scored": len(scored),
            "judged": sum(sample.judged is not None for sample in samples),
            "skipped questions": skipped,
            "prompts cut": len({sample.item for sample in samples if sample.cut}),
            "no answer found": sum(sample.prediction is None for sample in samples),
            "cut at the output limit": sum(sample.finish == "length" for sample in samples),
        },
        problems=_problems(plan, samples),
        questions=means,
    )


def overall(results: Sequence[Result], benchmarks: Mapping[str, Benchmark]) -> dict[str, Figure]:
    """Unweighted mean of the six long-context tasks, for each limit at which all six were measured."""
    wanted = {name for name, benchmark in benchmarks.items() if benchmark.overall}
    by_limit: dict[int | None, list[Result]] = defaultdict(list)
    for result in results:
        if result.benchmark in wanted:
            by_limit[result.max_input].append(result)
    figures = {}
    for limit, group in by_limit.items():
        if {result.benchmark for result in group} == wanted and all(result.questions for result in group):
            values = [value for result in group for value in result.questions.values()]
            strata = [result.benchmark for result in group for _ in result.questions]
            figures[str(limit)] = figure(values, strata)
    return figures


@dataclass
class Comparison:
    """Every later model against the first one, on the questions that both answered."""

    models: list[str]
    rows: list[tuple[str, list[Figure], list[Difference]]]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "benchmark": label,
                "means": [asdict(f) for f in means],
                "differences": [asdict(d) for d in differences],
            }
            for label, means, differences in self.rows
        ]
        return _plain({"models": self.models, "rows": rows})

    def write(self, folder: Path) -> None:
        """`comparison.json` and `comparison.md` below `folder`."""
        (folder / "comparison.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "comparison.json").write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    def markdown(self) -> str:
        later = self.models[1:]
        head = ["benchmark", *self.models, *(f"{name} − {self.models[0]}" for name in later)]
        body = [
            [label, *(_percent(mean) for mean in means), *(_gain(difference) for difference in differences)]
            for label, means, differences in self.rows
        ]
        note = "Differences are paired by question: mean [95 % interval], questions that got better/worse."
        return "\n".join([*_table(head, body), "", note]) + "\n"


def compare(reports: Sequence[Report]) -> Comparison:
    """Pair reports by benchmark, limit and question. A row holds what all of them measured."""
    first, *others = reports
    rows = []
    for result in first.results:
        matches = [
            next(
                (r for r in o.results if (r.benchmark, r.max_input) == (result.benchmark, result.max_input)),
                None,
            )
            for o in others
        ]
        found = [match for match in matches if match is not None]
        if len(found) < len(others):
            continue
        differences = []
        for match in found:
            common = [item for item in result.questions if item in match.questions]
            differences.append(
                paired([result.questions[i] for i in common], [match.questions[i] for i in common])
            )
        rows.append((result.label, [result.mean, *(match.mean for match in found)], differences))
    return Comparison([report.model for report in reports], rows)


def read_report(path: Path) -> Report:
    """A report from its `report.json`."""
    values = json.loads((path / "report.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    results = [
        Result(
            **{
                **row,
                "mean": _from_json(row["mean"]),
                "rule": _from_json(row["rule"]),
                "bounds": tuple(row["bounds"]),
                "best_of": {int(k): v for k, v in row["best_of"].items()},
                "best_of_bootstrap": {int(k): v for k, v in row["best_of_bootstrap"].items()},
                "macro": {n: _from_json(f) for n, f in row["macro"].items()},
                "subsets": {n: {k: _from_json(f) for k, f in s.items()} for n, s in row["subsets"].items()},
            }
        )
        for row in values["results"]
    ]
    total = {limit: _from_json(value) for limit, value in values["overall"].items()}
    return Report(values["model"], values["settings"], results, total)


def plot(reports: Sequence[Report], path: Path) -> None:
    """Bars of every benchmark with intervals, and pass@k beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, (bars, curves) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    labels = list(dict.fromkeys(result.label for report in reports for result in report.results))
    width = 0.8 / max(1, len(reports))
    for index, report in enumerate(reports):
        results = [result for result in report.results if result.mean.questions]
        places = [labels.index(result.label) + index * width for result in results]
        means = [100 * result.mean.value for result in results]
        errors = [
            [100 * max(0.0, result.mean.value - result.mean.low) for result in results],
            [100 * max(0.0, result.mean.high - result.mean.value) for result in results],
        ]
        bars.bar(places, means, width, yerr=errors, capsize=2, label=report.model)
        for result in results:
            ks = [k for k, value in result.best_of.items() if not math.isnan(value)]
            curves.plot(
                ks,
                [100 * result.best_of[k] for k in ks],
                marker=".",
                label=f"{result.label} ({report.model})",
            )
    bars.set_xticks([i + 0.4 - width / 2 for i in range(len(labels))], labels, rotation=30, ha="right")
    bars.set_ylabel("mean score, 95 % interval")
    curves.set_xlabel("k")
    curves.set_ylabel("pass@k (unbiased)")
    for axes in (bars, curves):
        axes.set_ylim(0, 100)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
    figure_.savefig(path, dpi=120)
    pyplot.close(figure_)


def _by_question(samples: Sequence[Sample], rule: bool = False) -> dict[str, list[float]]:
    questions: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        value = sample.rule if rule else sample.score
        if value is not None:
            questions[sample.item].append(value)
    return dict(questions)


def _figure(
    benchmark: Benchmark, means: Mapping[str, float], labels: Mapping[str, Mapping[str, str]]
) -> Figure:
    strata = [labels[item].get(benchmark.macro, "") for item in means] if benchmark.macro else None
    return figure(list(means.values()), strata)


def _subsets(
    means: Mapping[str, float], labels: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Figure]]:
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, mean in means.items():
        for name, value in labels[item].items():
            values[name][value].append(mean)
    return {
        name: {
            value: figure(group)
            for value, group in sorted(groups.items(), key=lambda pair: _natural(pair[0]))
        }
        for name, groups in values.items()
    }


def _macro(means: Mapping[str, float], labels: Mapping[str, Mapping[str, str]]) -> dict[str, Figure]:
    names = {name for item in means for name in labels[item]}
    return {
        name: figure(list(means.values()), [labels[item].get(name, "") for item in means])
        for name in sorted(names)
    }


def _natural(name: str) -> tuple[float, str]:
    """Bins sort by their lower end, names after them by letter."""
    digits = name.removeprefix("over ").split("K")[0]
    return (float(digits) + name.startswith("over "), "") if digits.isdigit() else (math.inf, name)


def _metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Means over samples of the secondary figures, the judge's readings among them."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for name, value in sample.metrics.items():
            values[name].append(value)
        for name, value in sample.readings.items():
            values[f"judge says yes ({name})"].append(value)
    return {name: sum(group) / len(group) for name, group in values.items()}


def _problems(plan: Plan, samples: Sequence[Sample]) -> dict[str, int]:
    problems: Counter[str] = Counter()
    problems.update({f"row not used: {reason}": count for reason, count in plan.bad.items()})
    problems.update({f"request failed: {reason}": count for reason, count in plan.failed.items()})
    problems.update(f"not judged: {sample.unjudged}" for sample in samples if sample.unjudged)
    problems.update(sample.fault for sample in samples if sample.fault)
    return dict(problems)


def _bounds(
    means: Mapping[str, float], questions: Mapping[str, Sequence[float]], asked: int, per_question: int
) -> tuple[float, float]:
    if asked == 0:
        return (math.nan, math.nan)
    total = sum(mean * len(questions[item]) for item, mean in means.items())
    missing = asked - sum(len(scores) for scores in questions.values())
    return (total / asked, (total + missing) / asked)


def _scoring(benchmark: Benchmark, judge_name: str) -> str:
    if not benchmark.judged:
        return benchmark.rule
    if not judge_name:
        return f"{benchmark.rule} only, no judge" if benchmark.rule == "rule" else benchmark.rule
    return f"judge {judge_name}" if benchmark.judge_replaces else f"max(rule, judge {judge_name})"


def _main_table(report: Report) -> list[str]:
    most = max((len(result.best_of) for result in report.results), default=0)
    ks = sorted({k for k in (1, 2, 4, most) if 1 < k <= most})
    head = [
        "benchmark",
        "score [95 %]",
        "rule only",
        *(f"pass@{k}" for k in ks),
        "questions × samples",
        "scored by",
    ]
    rows = []
    for result in report.results:
        passes = [_number(result.best_of.get(k, math.nan)) for k in ks]
        size = f"{result.mean.questions} × {len(result.best_of)}"
        name = result.label + ("" if result.complete else " (incomplete)")
        rows.append([name, _percent(result.mean), _number(result.rule.value), *passes, size, result.scoring])
    return _table(head, rows)


def _overall(report: Report) -> list[str]:
    return [
        "",
        *(
            f"OVERALL of the six tasks at {limit}: {_percent(value)}"
            for limit, value in report.overall.items()
        ),
    ]


def _details(report: Report) -> list[str]:
    lines: list[str] = []
    for result in report.results:
        lines += ["", f"## {result.label}", ""]
        counts = ", ".join(f"{count} {name}" for name, count in result.counts.items() if count)
        lines.append(f"{counts}.")
        if not result.complete:
            low, high = result.bounds
            lines.append(
                f"Incomplete: {_number(low)} if all that is missing were wrong, {_number(high)} if right."
            )
        lines += [f"* {count} × {problem}" for problem, count in result.problems.items()]
        if result.metrics:
            lines.append(
                "Also: "
                + ", ".join(f"{name} {_number(value)}" for name, value in result.metrics.items())
                + "."
            )
        passes = [
            [name, *(_number(v) for v in values.values())]
            for name, values in (
                ("pass@k, unbiased", result.best_of),
                ("pass@k, with replacement (release)", result.best_of_bootstrap),
            )
        ]
        if len(result.best_of) > 1:
            lines += ["", *_table(["", *(f"k={k}" for k in result.best_of)], passes)]
        for name, groups in result.subsets.items():
            if len(groups) > 1:
                rows = [[value, _percent(group), str(group.questions)] for value, group in groups.items()]
                rows.append(["unweighted mean", _percent(result.macro[name]), ""])
                lines += ["", *_table([name, "score [95 %]", "questions"], rows)]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]


def _percent(value: Figure) -> str:
    if not value.questions:
        return "–"
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _gain(value: Difference) -> str:
    mean = value.difference
    if not mean.questions:
        return "–"
    interval = f"[{100 * mean.low:+.1f}, {100 * mean.high:+.1f}]"
    return f"{100 * mean.value:+.1f} {interval}, {value.better}/{value.worse}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _from_json(value: Mapping[str, Any]) -> Figure:
    numbers = {name: math.nan if value[name] is None else value[name] for name in ("value", "low", "high")}
    return Figure(**numbers, questions=value["questions"])


def _plain(value: Any) -> Any:
    """Without nan, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
