"""Figures from samples: means, pass@k, bootstrap intervals, paired differences. Pure functions.

Scores need not be 0 or 1: "pass@k" of graded scores is the expected best of k samples, which is
pass@k where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
_SEED = 20250923


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over questions with its bootstrap interval. `questions` is how many it rests on.

    Not `complete` where answers or verdicts of its measurement are missing: what is there may be the easier part.
    """

    value: float
    low: float
    high: float
    questions: int
    complete: bool = True


def pass_at_k(scores: Sequence[float], k: int) -> float:
    """Expected best of k samples drawn WITHOUT replacement: for c correct of n, 1 − C(n−c, k)/C(n, k).

    Unbiased (Chen et al. 2021, eq. 1). The i-th smallest score is the best of the draw in
    C(i−1, k−1) of C(n, k) cases. Raises ValueError where there are fewer than k samples.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, found {n}")
    weights = (comb(i - 1, k - 1) for i in range(1, n + 1))
    return sum(w * s for w, s in zip(weights, sorted(scores), strict=True)) / comb(n, k)


def pass_at_k_bootstrap(scores: Sequence[float], k: int) -> float:
    """Expected best of k samples drawn WITH replacement, 1 − (1 − c/n)^k: what the SPELL release reports.

    It is smaller than the unbiased estimate, and defined for k > n.
    """
    n = len(scores)
    if n == 0 or k < 1:
        raise ValueError("needs at least one sample and k of at least 1")
    shares = [(i / n) ** k for i in range(n + 1)]
    return sum((shares[i + 1] - shares[i]) * s for i, s in enumerate(sorted(scores)))


def figure(
    values: Sequence[float],
    strata: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    complete: bool = True,
) -> Figure:
    """Mean over questions, percentile interval of a bootstrap over questions.

    With `strata` (one name a question) the value is the mean of the strata's means, unweighted or by `weights` (of
    each stratum, 1 in all), and questions are resampled within theirs.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        nan = float("nan")
        return Figure(nan, nan, nan, 0, complete)
    names = np.asarray(strata if strata is not None else [""] * data.size)
    order = sorted(set(names.tolist()))
    groups = [data[names == name] for name in order]
    shares = np.asarray([weights[name] if weights else 1 / len(order) for name in order])
    value = float(shares @ np.asarray([group.mean() for group in groups]))
    random = np.random.default_rng(_SEED)
    means = shares @ np.stack([_resampled(group, random) for group in groups])
    low, high = _interval(means)
    return Figure(value, low, high, int(data.size), complete)


@dataclass(frozen=True, slots=True)
class Difference:
    """Second minus first over the questions that both have, with how many got better and worse."""

    difference: Figure
    better: int
    worse: int


def paired(
    first: Sequence[float],
    second: Sequence[float],
    strata: Sequence[str] | None = None,
    complete: bool = True,
) -> Difference:
    """Compare two lists of per-question scores in the same order: questions are resampled as pairs."""
    gains = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    better, worse = int((gains > 1e-12).sum()), int((gains < -1e-12).sum())
    return Difference(figure(gains.tolist(), strata, complete=complete), better, worse)


def _resampled(group: Floats, random: np.random.Generator) -> Floats:
    """Means of resamples, drawn in blocks so that memory stays bounded."""
    block = max(1, 4_000_000 // group.size)
    counts = [min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block)]
    means = [group[random.integers(0, group.size, size=(count, group.size))].mean(axis=1) for count in counts]
    return np.concatenate(means)


def _interval(means: Floats) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
