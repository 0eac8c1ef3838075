"""The statistics that compare runs: means over seeds, intervals, rank correlation, the cost of a target.

What became of one run is decided by `open_r1_capo.runs.outcomes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import spearmanr

from open_r1_capo.runs import outcomes

DRAWS = 1000  # bootstrap resamples
LEVEL = 0.95  # coverage of the intervals


def ema(values: Sequence[float], weight: float) -> np.ndarray:
    """Exponential moving average y_t = Σ_k w^(t−k) x_k / Σ_k w^(t−k), over the known x_k with k ≤ t.

    `values` (T,) may hold NaN, which stays NaN; the weight w in [0, 1) is the share of the past.

    Raises:
        ValueError: w lies outside [0, 1).
    """
    if not 0 <= weight < 1:
        raise ValueError(f"the smoothing is a weight in [0, 1), got {weight}")
    out = np.full(len(values), np.nan)
    total = count = 0.0
    for i, value in enumerate(values):
        total, count = weight * total, weight * count
        if not np.isnan(value):
            total, count = total + value, count + 1
            out[i] = total / count
    return out


def mean_and_error(series: Sequence[Mapping[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over seeds (each step → value) at every step that all of them have; nothing is interpolated.

    Returns:
        steps (S,) int64 in order, mean (S,), and its standard error (S,), stdev (n − 1) / √n; NaN for one seed.
    """
    known = [{step for step, value in one.items() if not np.isnan(value)} for one in series]
    steps = np.array(sorted(set.intersection(*known)) if known else [], dtype=np.int64)
    table = np.array([[one[step] for step in steps.tolist()] for one in series], dtype=float).reshape(
        len(series), len(steps)
    )
    if len(table) < 2:
        return steps, table.sum(0), np.full(len(steps), np.nan)
    return steps, table.mean(0), table.std(0, ddof=1) / np.sqrt(len(table))


def bootstrap(
    seeds: Sequence[np.ndarray],
    statistic: Callable[[Sequence[np.ndarray]], float],
    steps: bool = False,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval over seeds and, with `steps`, over the rows (steps) of each seed's array.

    The steps of a run depend on each other, so that an interval over few seeds and many steps is too narrow rather
    than too wide. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13. The statistic may be
    ±∞; NaN leaves the resample out. The generator is seeded: the same data give the same interval.

    Returns:
        The interval's ends, both values of the statistic (no interpolation); NaN without two rows or seeds to draw.
    """
    rng = np.random.default_rng(0)
    if len(seeds) < 2 and not (steps and len(seeds) == 1 and len(seeds[0]) > 1):
        return float("nan"), float("nan")
    values = []
    for _ in range(draws):
        drawn = [seeds[i] for i in rng.integers(len(seeds), size=len(seeds))]
        if steps:
            drawn = [rows[rng.integers(len(rows), size=len(rows))] for rows in drawn]
        values.append(statistic(drawn))
    known = np.array(values)[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    ends = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(ends[0]), float(ends[1])


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation of (N,) values: Pearson's of the ranks, ties averaged; pairs with NaN are left out.

    NaN for fewer than three pairs, or if one side is constant.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)


def cost_to(target: float, rewards: Sequence[float], cost: Sequence[float]) -> float:
    """What a run has spent when the mean reward of its last outcomes.WINDOW steps first reaches a target.

    `rewards` (T,) are NaN where a step has none; `cost` (T,) is cumulative, read at the last step of that window,
    so never before step WINDOW; ∞ if the target is not reached, NaN if the cost is unknown.
    """
    pairs = [(reward, spent) for reward, spent in zip(rewards, cost, strict=True) if not np.isnan(reward)]
    means = outcomes.trailing_means([reward for reward, _ in pairs])
    reached = [i for i, mean in enumerate(means) if mean >= target]
    return float(pairs[reached[0] + outcomes.WINDOW - 1][1]) if reached else float("inf")
