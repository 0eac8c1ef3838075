"""What became of a run, by stated rules on its in-training accuracy: the metric `reward`, on fresh problems."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

WINDOW = 10  # optimizer steps; 960 completions in the lab's aggressive regime, a standard error of at most 0.016
MARGIN = 0.05  # a run survives if it ends within this of its best window
RISE = 0.10  # a run has risen if a window is this much above the base policy


def trailing_means(rewards: Sequence[float]) -> list[float]:
    """Mean reward of each full window of `WINDOW` steps, by its last step; empty for a shorter run."""
    return [statistics.fmean(rewards[end - WINDOW : end]) for end in range(WINDOW, len(rewards) + 1)]


def last_accuracy(rewards: Sequence[float]) -> float:
    """Mean reward of the last `WINDOW` steps (of all, for a shorter run)."""
    return statistics.fmean(rewards[-WINDOW:])


def best_accuracy(rewards: Sequence[float]) -> float:
    """Mean reward of the best window."""
    return max(trailing_means(rewards), default=last_accuracy(rewards))


def base_accuracy(runs: Iterable[Sequence[float]]) -> float:
    """Mean first reward of runs of one scale, whose completions are the base policy's; NaN without runs."""
    first = [rewards[0] for rewards in runs if rewards and not math.isnan(rewards[0])]
    return statistics.fmean(first) if first else math.nan


def survived(rewards: Sequence[float]) -> bool:
    """Whether a run ends within `MARGIN` of its best window; a run that never learnt survives too."""
    return last_accuracy(rewards) >= best_accuracy(rewards) - MARGIN


def usable(rewards: Sequence[float], base: float) -> bool:
    """Whether a run survives and does not end below the base policy's accuracy."""
    return survived(rewards) and last_accuracy(rewards) >= base


def collapsed(rewards: Sequence[float], base: float) -> bool:
    """Whether a run ends below the base policy's accuracy after having been `RISE` above it."""
    return last_accuracy(rewards) < base and best_accuracy(rewards) >= base + RISE
