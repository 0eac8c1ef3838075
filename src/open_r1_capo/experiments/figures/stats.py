"""The statistics that compare runs: means over seeds, intervals, rank correlation, the cost of a target.

What became of one run is decided by `open_r1_capo.runs.outcomes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from open_r1_capo.runs import outcomes

DRAWS = 1000  # bootstrap resamples
LEVEL = 0.95  # coverage of the intervals


def ema(values: Sequence[float], weight: float) -> np.ndarray:
    """Smooth by an exponential moving average whose weights add to one from the first value on.

    Args:
        values: (T,), any unit; NaN is left out of the average and stays NaN.
        weight: w in [0, 1), the share of the past: y_t = Σ_k w^(t−k) x_k / Σ_k w^(t−k), over the k ≤ t that are known.

    Returns:
        (T,) float64.

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
    """Take the mean over seeds at every step that all of them have; nothing is interpolated.

    Args:
        series: a mapping from step to value for each seed; NaN is a step without a value.

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
    """Take a 95 % percentile bootstrap interval over seeds, and over the steps within each if asked.

    The steps of a run depend on each other, so that an interval over few seeds and many steps is too narrow rather
    than too wide. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13.

    Args:
        seeds: one array for each seed; its rows are the steps.
        statistic: a number from such a list; ±∞ is allowed, NaN leaves the resample out.
        steps: resample the rows of each drawn seed as well.
        draws: resamples; the generator is seeded, so that the same data give the same interval.

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


def ranks(values: Sequence[float]) -> np.ndarray:
    """Rank (N,) values without NaN from 1; equal ones share the mean of their places."""
    _, inverse, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return ((2 * last - count + 1) / 2)[inverse]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Take Spearman's rank correlation: Pearson's of the ranks, ties averaged.

    Args:
        x: (N,); pairs with a NaN are left out.
        y: (N,).

    Returns:
        ρ in [−1, 1]; NaN for fewer than three pairs, or if one side is constant.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = ~(np.isnan(x) | np.isnan(y))
    if known.sum() < 3:
        return float("nan")
    a, b = (ranks(side[known]) - (known.sum() + 1) / 2 for side in (x, y))
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def cost_to(target: float, rewards: Sequence[float], cost: Sequence[float]) -> float:
    """Find what a run has spent when the mean reward of its last outcomes.WINDOW steps first reaches a target.

    Args:
        target: accuracy.
        rewards: (T,), a step's mean reward; NaN for a step without one.
        cost: (T,), cumulative: completions, accepted tokens or steps.

    Returns:
        The cost at the last step of the first such window, which is full, so never before step WINDOW; ∞ if the
        target is not reached, NaN if the cost is not known.
    """
    pairs = [(reward, spent) for reward, spent in zip(rewards, cost, strict=True) if not np.isnan(reward)]
    means = outcomes.trailing_means([reward for reward, _ in pairs])
    reached = [i for i, mean in enumerate(means) if mean >= target]
    return float(pairs[reached[0] + outcomes.WINDOW - 1][1]) if reached else float("inf")
