"""Figures of one benchmark at one limit, from its scored samples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from eval.benchmark import Benchmark
from eval.runner import BenchmarkPlan
from eval.scoring import ScoredAnswer
from eval.statistics import Figure, figure, pass_at_k, pass_at_k_bootstrap

Estimate = Callable[[Sequence[float]], float]
"""What an item's samples come to."""


@dataclass
class Result:
    """One benchmark at one limit. Scores are in [0, 1]; tables show them times 100.

    `best_of[k]` is pass@k, unbiased; `best_of_bootstrap[k]` is the release's estimate of it. `subsets`
    has a figure a value of every label, `macro` the unweighted mean of a label's values. `bounds` is
    where the mean would lie if every missing or unjudged sample were wrong, or right. `questions` has the mean of
    each question, `labels` its subsets, `strata` that by whose means the headline is a mean; the items of one group are
    one question.
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
    strata: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def label(self) -> str:
        return self.title if self.max_input is None else f"{self.title} @ {self.max_input}"

    @property
    def complete(self) -> bool:
        """There was something to ask, and every sample was answered and scored."""
        return whole(self.counts)


def whole(counts: Mapping[str, int]) -> bool:
    """Whether the counts of a result are those of a complete one."""
    return 0 < counts["asked"] == counts["scored"]


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
    given, ruled = _by_item(scored), _by_item(samples, rule=True)
    groups = {item.id: item.group or item.id for item in plan.items}
    means = _grouped(given, groups, fmean)
    labels = {groups[sample.item]: sample.labels for sample in reversed(samples)}
    sets = {groups[item.id]: item.labels.get(plan.benchmark.macro, "") for item in plan.items}
    asked = [item.id for item in plan.items if item.id not in skipped]
    complete = 0 < len(asked) * per_question == len(scored)

    def headline(values: Mapping[str, Sequence[float]], estimate: Estimate) -> float:
        return _headline(_grouped(values, groups, estimate), sets)

    def best(k: int, estimate: Callable[[Sequence[float], int], float]) -> float:
        enough = {item: scores for item, scores in given.items() if len(scores) >= k}
        return headline(enough, lambda scores: estimate(scores, k))

    def bound(missing: float) -> float:
        every = {item: given.get(item, []) for item in asked}
        filled = {item: [*some, *[missing] * (per_question - len(some))] for item, some in every.items()}
        return headline(filled, fmean)

    ks = range(1, per_question + 1)
    return Result(
        benchmark=plan.benchmark.name,
        title=plan.benchmark.title,
        max_input=plan.max_input,
        scoring=_scoring(plan.benchmark, judge_name),
        mean=_figure(plan.benchmark, means, labels, complete),
        rule=_figure(plan.benchmark, _grouped(ruled, groups, fmean), labels, complete),
        bounds=(bound(0.0), bound(1.0)),
        best_of={k: best(k, pass_at_k) for k in ks},
        best_of_bootstrap={k: best(k, pass_at_k_bootstrap) for k in ks},
        subsets=_subsets(means, labels, complete),
        macro=_macro(means, labels, complete),
        metrics=_metrics(samples),
        counts={
            "questions": len(sets),
            "asked": len(asked) * per_question,
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
        strata={item: sets[item] for item in means},
    )


def _by_item(samples: Sequence[ScoredAnswer], rule: bool = False) -> dict[str, list[float]]:
    items: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        value = sample.rule if rule else sample.score
        if value is not None:
            items[sample.item].append(value)
    return dict(items)


def _grouped(
    items: Mapping[str, Sequence[float]], groups: Mapping[str, str], estimate: Estimate
) -> dict[str, float]:
    """Of every question the mean over its items of what is estimated from an item's samples."""
    values: dict[str, list[float]] = defaultdict(list)
    for item, scores in items.items():
        values[groups[item]].append(estimate(scores))
    return {group: fmean(found) for group, found in values.items()}


def _headline(questions: Mapping[str, float], sets: Mapping[str, str]) -> float:
    """The mean over sets of the mean over a set's questions; nan where there is none."""
    strata: dict[str, list[float]] = defaultdict(list)
    for question, value in questions.items():
        strata[sets[question]].append(value)
    return fmean(map(fmean, strata.values())) if strata else math.nan


def _figure(
    benchmark: Benchmark, means: Mapping[str, float], labels: Mapping[str, Mapping[str, str]], complete: bool
) -> Figure:
    strata = [labels[item].get(benchmark.macro, "") for item in means] if benchmark.macro else None
    return figure(list(means.values()), strata, complete=complete)


def _subsets(
    means: Mapping[str, float], labels: Mapping[str, Mapping[str, str]], complete: bool
) -> dict[str, dict[str, Figure]]:
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, mean in means.items():
        for name, value in labels[item].items():
            values[name][value].append(mean)
    return {
        name: {
            value: figure(group, complete=complete)
            for value, group in sorted(groups.items(), key=lambda pair: _natural(pair[0]))
        }
        for name, groups in values.items()
    }


def _macro(
    means: Mapping[str, float], labels: Mapping[str, Mapping[str, str]], complete: bool
) -> dict[str, Figure]:
    names = {name for item in means for name in labels[item]}
    return {
        name: figure(list(means.values()), [labels[item].get(name, "") for item in means], complete=complete)
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


def _scoring(benchmark: Benchmark, judge_name: str) -> str:
    if not benchmark.judged:
        return benchmark.rule
    if not judge_name:
        return f"{benchmark.rule} only, no judge" if benchmark.rule == "rule" else benchmark.rule
    return f"judge {judge_name}" if benchmark.judge_replaces else f"max(rule, judge {judge_name})"
