"""The figures that are not the paper's: what each method survives, and how well the model predicts."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

import tables
from curves import Data, FigureError
from drawing import COLOURS, RC, Result, caption, heading, look

POINTS = 300  # of a scatter, an arm
MARKERS = "osD^vPX"


def stability(data: Data, smooth: float) -> Result:
    """Ours: last in-training accuracy against the learning rate; a ring marks the largest rate usable with all seeds.

    Args:
        data: arms that share a label and override learning_rate.
        smooth: not used.

    Returns:
        The figure, and its table.
    """
    methods, numbers, table = tables.stability(data)
    families = {"GRPO": [], "Dr.GRPO": [], "REINFORCE": []}
    for label, lines in methods.items():
        recipe = lines[0].arm.recipe
        families["Dr.GRPO" if recipe.startswith("dr") else "REINFORCE" if recipe.startswith("rein") else "GRPO"] += [
            label
        ]
    families = {name: labels for name, labels in families.items() if labels}
    with plt.rc_context(RC):
        figure, axes = plt.subplots(
            1, len(families), figsize=(max(4.8, 3.5 * len(families)), 4.2), sharey=True, squeeze=False
        )
        for axis, (name, labels) in zip(axes.flat, families.items(), strict=True):
            for place, label in enumerate(labels):
                rates_panel(axis, numbers["methods"][label], label, (place, len(labels)))
            rates = sorted({rate for label in labels for rate in numbers["methods"][label]["rates"]})
            axis.axhline(numbers["base"], color="#666666", lw=1, ls=":", label="base policy")
            axis.set_xscale("log", base=2)
            labels = [f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-") for rate in rates]
            axis.set_xticks(rates, [label if i % 2 == 0 else "" for i, label in enumerate(labels)])
            axis.set(xlabel="learning rate (peak)", ylim=(0, 1))
            axis.set_title(f"{name}: last in-training accuracy")
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        text = "mean ± standard error, shifted sideways; hollow: fewer seeds; ring: largest rate usable with all"
        caption(figure, f"{note_of(data)}; {text}")
    return Result(heading(data) | numbers, figure, table)


def rates_panel(axis: Axes, found: dict, label: str, place: tuple[int, int]) -> None:
    """Draw one method's accuracy by rate, a little aside, so that the methods do not hide each other.

    Args:
        axis: where.
        found: its part of `tables.stability`'s numbers.
        label: in the legend.
        place: its number among the panel's methods, and how many those are.
    """
    colour, marker = COLOURS[place[0] % len(COLOURS)], MARKERS[place[0] % len(MARKERS)]
    rates = found["rates"]
    x = np.array(list(rates)) * 2 ** (0.06 * (place[0] - (place[1] - 1) / 2))
    means = [np.mean(one["last"]) for one in rates.values()]
    errors = [np.std(one["last"], ddof=1) / math.sqrt(one["n"]) if one["n"] > 1 else 0 for one in rates.values()]
    axis.errorbar(x, means, errors, label=label, marker=marker, ms=4, capsize=2, lw=1.2, color=colour)
    most = max(one["n"] for one in rates.values())
    few = [i for i, one in enumerate(rates.values()) if one["n"] < most]  # a search leaves a rate at the first failure
    axis.plot(x[few], np.array(means)[few], marker, ms=4, mfc="white", mec=colour, ls="none")
    if found["largest_usable"]:
        place = list(rates).index(found["largest_usable"])
        axis.plot(x[place], means[place], "o", ms=11, mfc="none", mec=colour, mew=1.3)


def calibration(data: Data, smooth: float) -> Result:
    """Ours: what the model predicts against what is measured, a point a step, with the diagonal.

    Args:
        data: runs with tables.CALIBRATION_KEYS and tables.SCALE_KEYS.
        smooth: not used.

    Returns:
        The figure, and its table.

    Raises:
        FigureError: nothing was measured.
    """
    runs = [run for line in data.lines for run in line.runs]
    shown = {k: v for k, v in tables.PAIRS.items() if any((tables.pairs(run, *v) > 0).all(1).any() for run in runs)}
    if not shown:
        raise FigureError("nothing was measured after the steps; train with capo.measure_kl=1")
    numbers, table = tables.calibration(data)
    rows, columns = len(shown), len(data.lines)
    with plt.rc_context(RC | {"axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}):
        size = (max(4.8, 1.5 * columns + 0.6), 1.75 * rows + 0.4)
        figure, axes = plt.subplots(rows, columns, figsize=size, sharex="row", sharey="row", squeeze=False)
        for row, (title, (predicted, measured, exponent)) in zip(axes, shown.items(), strict=True):
            symbol, target = title.split(" → ")
            for axis, line, style in zip(row, data.lines, look(data.lines), strict=True):
                both = np.concatenate([tables.pairs(run, predicted, measured, exponent) for run in line.runs])
                both = both[(both > 0).all(1)]
                x, y = both[:: max(1, math.ceil(len(both) / POINTS))].T
                axis.plot(x, y, "o", color=style["color"], ms=2, alpha=0.5, mew=0, rasterized=True)
                axis.set(xscale="log", yscale="log", xlabel=f"${symbol}$ of the batch")
            limits = row[0].get_xlim()
            for axis in row:
                axis.plot(limits, limits, color="#444444", lw=0.8, ls="--", scalex=False, scaley=False)
            row[0].set_ylabel(target)
        for axis, line in zip(axes[0], data.lines, strict=True):
            axis.set_title(line.arm.label)
        text = f"a point a step that was taken (at most {POINTS} an arm), where both are positive"
        caption(figure, f"{note_of(data)}; {text}; dashed: predicted = measured")
    return Result(heading(data) | {"arms": numbers}, figure, table)


def note_of(data: Data) -> str:
    """The sentence below a figure that is no panel of lines: scale and seeds."""
    return f"{data.experiment.scale}; {data.seeds}"
