"""What the model predicts of a step against what is measured (ours)."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from open_r1_capo.experiments.figures import stats, tables
from open_r1_capo.experiments.figures.curves import Data, FigureError, Line
from open_r1_capo.experiments.figures.drawing import COLOURS, RC, Result, heading

# what predicts, what is measured, and the exponent of capo/step_scale that turns α's prediction into the taken step's
PAIRS = {
    "m_F → KL": ("capo/batch_policy_shift", "capo/measured_kl", 2),
    "m_F → KL of the last layer alone": ("capo/batch_policy_shift", "capo/measured_kl_head", 2),
    "m_H → change of the objective": ("capo/batch_objective_shift", "capo/measured_objective", 1),
}
KEYS = (*dict.fromkeys(key for predicted, measured, _ in PAIRS.values() for key in (predicted, measured)),)
POINTS = 300  # of a scatter, an arm
ACROSS = 7  # panels a row
DRAWS = 200  # bootstrap resamples of the table: ten intervals a method, of 20 methods
NOISE = 1e-6  # nats; of a smaller measured KL, the rounding of float32 log-probabilities is a tenth and more


def calibration(data: Data) -> Result:
    """Draw a point for each step, a panel for each arm, and the diagonal; a FigureError if nothing was measured."""
    there = [
        name for name, pair in PAIRS.items() if any((tables.pairs(run, *pair) > 0).all(1).any() for run in data.runs)
    ]
    if not there:
        raise FigureError("nothing was measured after the steps; train with capo.measure_kl=1")
    blocks = [names for symbol in ("m_F", "m_H") if (names := [name for name in there if name.startswith(symbol)])]
    numbers, table = calibration_table(data)
    columns = min(ACROSS, len(data.lines))
    rows = math.ceil(len(data.lines) / columns)
    with plt.rc_context(RC | {"axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}):
        figure = plt.figure(figsize=(max(4.8, 1.5 * columns + 0.6), 1.75 * rows * len(blocks) + 0.8))
        parts = figure.subfigures(len(blocks), 1, squeeze=False)[:, 0]
        for part, names in zip(parts, blocks, strict=True):
            axes = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
            for axis, line in zip(axes.flat, data.lines, strict=False):
                calibration_panel(axis, line, names)
            for axis in axes.flat[len(data.lines) :]:
                axis.set_visible(False)
            limits = axes[0, 0].get_xlim()
            for axis in axes.flat[: len(data.lines)]:
                axis.plot(limits, limits, color="#444444", lw=0.8, ls="--", scalex=False, scaley=False)
            below = f"${names[0].split(' → ')[0]}$ of the step"
            part.supxlabel(below, fontsize=8.5)
            part.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2, markerscale=3)
        text = f"a point a step that was taken (at most {POINTS} an arm), both positive; dashed: predicted = measured"
        parts[-1].supxlabel(f"{below}\n{data.experiment.scale}; {data.seeds}; {text}", fontsize=7.5)
    return Result(heading(data) | {"arms": numbers}, figure, table)


def calibration_panel(axis: Axes, line: Line, names: list[str]) -> None:
    """Draw the steps of an arm for some `names` of PAIRS that share their prediction."""
    for name, colour in zip(names, COLOURS, strict=False):
        both = np.concatenate([tables.pairs(run, *PAIRS[name]) for run in line.runs])
        both = both[(both > 0).all(1)]
        x, y = both[:: max(1, math.ceil(len(both) / POINTS))].T
        label = f"measured {name.split(' → ')[1]}"
        axis.plot(x, y, "o", color=colour, ms=2, alpha=0.5, mew=0, rasterized=True, label=label)
    axis.set(xscale="log", yscale="log")
    axis.minorticks_off()
    axis.set_title(line.arm.label)


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Least-squares slope of log y on log x, over the pairs where both are positive; NaN for fewer than three."""
    positive = (x > 0) & (y > 0)
    a, b = np.log(x[positive]), np.log(y[positive])
    a = a - a.mean() if len(a) else a
    return float((a * b).sum() / (a * a).sum()) if len(a) > 2 and (a * a).sum() > 0 else float("nan")


def median_ratio(x: np.ndarray, y: np.ndarray) -> float:
    """Median of y/x over the pairs where both are positive; NaN without one."""
    positive = (x > 0) & (y > 0)
    return float(np.median(y[positive] / x[positive])) if positive.any() else float("nan")


def calibration_table(data: Data) -> tuple[dict[str, Any], str]:
    """Slope, ratio and rank correlation of PAIRS: the numbers by arm, and Markdown."""
    functions = {"slope": slope, "median_ratio": median_ratio, "spearman": stats.spearman}
    rows, numbers = [], {}
    for line in data.lines:
        arm = numbers.setdefault(line.arm.label, {})
        for label, pair in PAIRS.items():
            seeds = [tables.pairs(run, *pair) for run in line.runs]
            clear = [one[one[:, 1] > NOISE] for one in seeds] if "KL" in label else seeds
            arm[label] = values = {
                name: tables.estimate(seeds if name == "spearman" else clear, tables.pooled(function), DRAWS)
                for name, function in functions.items()
            }
            both = np.concatenate(seeds)
            values["positive"] = float((both > 0).all(1).mean()) if len(both) else float("nan")
            cells = [tables.interval(values[name], "#.2g" if name == "median_ratio" else ".2f") for name in functions]
            rows.append([line.arm.label, label, *cells, tables.number(values["positive"], ".0%")])
        shares = [tables.pairs(run, "capo/measured_kl", "capo/measured_kl_head", 0) for run in line.runs]
        arm["share of the last layer"] = share = tables.estimate(shares, tables.pooled(median_ratio), DRAWS)
        rows.append([line.arm.label, "KL of the last layer alone / KL", "–", tables.interval(share, "#.2g"), "–", "–"])
    header = ["arm", "predicted → measured", "slope (log-log)", "median ratio", "Spearman", "both positive"]
    notes = (
        "A step each; ratio is measured / predicted. [95 % bootstrap interval over seeds and steps.] Slope and ratio: "
        f"both positive, a KL above {NOISE:g} (rounding); Spearman: all. Skipped steps are left out. {data.seeds}."
    )
    return numbers, tables.markdown(data.experiment.title, header, rows, notes)
