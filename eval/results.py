"""Figures of one benchmark at one limit, from its scored samples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from eval.benchmark import Benchmark, Item
from eval.runner import BenchmarkPlan
from eval.scoring import ScoredAnswer
from eval.statistics import Figure, figure, mean_pass, pass_at_k, pass_at_k_bootstrap


@dataclass
class Result:
    """One benchmark at one limit. Scores are in [0, 1]; tables show them times 100.

    `best_of[k]` is pass@k, unbiased; `best_of_bootstrap[k]` is the release's estimate of it. `subsets`
    has a figure a value of every label, `macro` the unweighted mean of a label's values. `bounds` is
    where the mean would lie if every missing or unjudged sample were wrong, or right. `questions` has the mean of
    each question, `labels` its subsets; the items of one group are one question.
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
    labels: dict[str, dict[str, str]] = field(repr=False)

    @property
    def label(self) -> str:
        return self.title if self.max_input is None else f"{self.title} @ {self.max_input}"

    @property
    def complete(self) -> bool:
        """There was something to ask, and every sample was answered and scored."""
        return 0 < self.counts["asked"] == self.counts["scored"]


def summarise(
    plan: BenchmarkPlan,
    samples: Sequence[ScoredAnswer],
    per_question: int,
    skipped: Collection[str],
    judge_name: str,
) -> Result:
    """Figures of one plan. `per_question` is how many samples each item should have, `skipped` the items that did not
    fit."""
    scored = [sample for sample in samples if sample.score is not None]
    questions = _by_question(scored)
    groups = {item.id: item.group or item.id for item in plan.items}
    means = _means(questions, groups)
    rule_means = _means(_by_question(samples, rule=True), groups)
    labels = {groups[sample.item]: sample.labels for sample in reversed(samples)}
    asked_items = [item for item in plan.items if item.id not in skipped]
    asked = len(asked_items) * per_question
    ks = range(1, per_question + 1)
    return Result(
        benchmark=plan.benchmark.name,
        title=plan.benchmark.title,
        max_input=plan.max_input,
        scoring=_scoring(plan.benchmark, judge_name),
        mean=_figure(plan.benchmark, means, labels),
        rule=_figure(plan.benchmark, rule_means, labels),
        bounds=_bounds(plan.benchmark, asked_items, questions, per_question),
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
            "skipped questions": len(skipped),
            "prompts cut": len({sample.item for sample in samples if sample.cut}),
            "no answer found": sum(sample.prediction is None for sample in samples),
            "cut at the output limit": sum(sample.finish == "length" for sample in samples),
        },
        problems=_problems(plan, samples),
        questions=means,
        labels={item: dict(labels[item]) for item in means},
    )


def _by_question(samples: Sequence[ScoredAnswer], rule: bool = False) -> dict[str, list[float]]:
    questions: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        value = sample.rule if rule else sample.score
        if value is not None:
            questions[sample.item].append(value)
    return dict(questions)


def _means(samples: Mapping[str, Sequence[float]], groups: Mapping[str, str]) -> dict[str, float]:
    """The mean of every question: of its samples, then of the items of its group."""
    items: dict[str, list[float]] = defaultdict(list)
    for item, scores in samples.items():
        items[groups[item]].append(fmean(scores))
    return {group: fmean(means) for group, means in items.items()}


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


def _metrics(samples: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Means over samples of the secondary figures, the judge's readings among them."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for name, value in sample.metrics.items():
            values[name].append(value)
        for name, value in sample.readings.items():
            values[f"judge says yes ({name})"].append(value)
    return {name: sum(group) / len(group) for name, group in values.items()}


def _problems(plan: BenchmarkPlan, samples: Sequence[ScoredAnswer]) -> dict[str, int]:
    problems: Counter[str] = Counter()
    problems.update({f"row not used: {reason}": count for reason, count in plan.bad.items()})
    problems.update({f"request failed: {reason}": count for reason, count in plan.failed.items()})
    problems.update(f"not judged: {sample.unjudged}" for sample in samples if sample.unjudged)
    problems.update(sample.fault for sample in samples if sample.fault)
    return dict(problems)


def _bounds(
    benchmark: Benchmark, items: Sequence[Item], questions: Mapping[str, Sequence[float]], per_question: int
) -> tuple[float, float]:
    """The headline with every missing sample wrong, and right."""
    if not items:
        return (math.nan, math.nan)
    strata: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for item in items:
        scores = questions.get(item.id, ())
        total, missing = sum(scores), per_question - len(scores)
        strata[item.labels.get(benchmark.macro, "")].append(
            (total / per_question, (total + missing) / per_question)
        )
    low, high = (fmean(fmean(pair[end] for pair in group) for group in strata.values()) for end in (0, 1))
    return (low, high)


def _scoring(benchmark: Benchmark, judge_name: str) -> str:
    if not benchmark.judged:
        return benchmark.rule
    if not judge_name:
        return f"{benchmark.rule} only, no judge" if benchmark.rule == "rule" else benchmark.rule
    return f"judge {judge_name}" if benchmark.judge_replaces else f"max(rule, judge {judge_name})"
