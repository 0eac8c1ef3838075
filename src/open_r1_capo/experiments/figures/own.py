"""The figures that are not the paper's: what each method survives, and how well the model predicts."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from open_r1_capo.experiments.figures import stats, tables
from open_r1_capo.experiments.figures.curves import Data, FigureError, Line, Run
from open_r1_capo.experiments.figures.drawing import COLOURS, RC, Result, caption, heading

POINTS = 300  # of a scatter, an arm
ACROSS = 7  # panels a row
MARKERS = "osD^vPX"
DRAWS = 200  # bootstrap resamples of the calibration table: ten intervals a method, of 20 methods
STAGES = ((2, 10), (11, 20), (21, None))  # steps: a warm-up without its first, which stands still; then the collapse
NOISE = 1e-6  # nats; of a smaller measured KL, the rounding of float32 log-probabilities is a tenth and more


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
            labels = [f"{r:g}" if r >= 0.1 else f"{r:.1e}".replace(".0e", "e").replace("e-0", "e-") for r in rates]
            every = 1 if len(rates) < 5 else 2
            axis.set_xticks(rates, [label if i % every == 0 else "" for i, label in enumerate(labels)])
            axis.set(xlabel="learning rate (peak)", ylim=(-0.02, 1.04))
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
    axis.plot(x[few], np.array(means)[few], marker, ms=4, mfc="white", mec=colour, ls="none", zorder=3)
    if found["largest_usable"]:
        place = list(rates).index(found["largest_usable"])
        axis.plot(x[place], means[place], "o", ms=11, mfc="none", mec=colour, mew=1.3)


def step_sizes(data: Data, smooth: float) -> Result:
    """Ours: the gradient's norm before clipping and the measured KL of a step, early and late in training.

    Args:
        data: runs with grad_norm and measured_kl.
        smooth: not used.

    Returns:
        Their means over the steps of each of STAGES and over seeds, by arm.
    """
    names = [f"{first} to {last}" if last else f"from {first}" for first, last in STAGES]
    keys, rows, numbers = {"gradient norm": "grad_norm", "KL": "capo/measured_kl"}, [], {}
    for line in data.lines:
        label = ", ".join((line.arm.label, *line.arm.overrides))
        numbers[label] = {
            name: [float(np.mean([stage_mean(run, key, *stage) for run in line.runs])) for stage in STAGES]
            for name, key in keys.items()
        }
        largest = max(map(tables.largest_kl, line.runs))
        numbers[label]["largest KL"] = largest
        cells = [tables.number(value, ".2g") for name in keys for value in numbers[label][name]]
        rows.append([line.arm.label, ", ".join(line.arm.overrides), *cells, tables.number(largest, ".2g")])
    header = ["arm", "settings", *(f"{key}, steps {name}" for key in keys for name in names), "largest KL"]
    notes = f"Means over the steps and over seeds; KL in nats, of a whole step. {data.seeds}."
    return Result(
        heading(data) | {"stages": names, "arms": numbers},
        table=tables.markdown(data.experiment.title, header, rows, notes),
    )


def stage_mean(run: Run, key: str, first: int, last: int | None) -> float:
    """The mean of a metric over the steps from `first` to `last`, None for the end; NaN where there is none."""
    steps, values = run.series(key)
    inside = values[(steps >= first) & (steps <= (last or np.inf))]
    return float(inside.mean()) if len(inside) else float("nan")


def calibration(data: Data, smooth: float) -> Result:
    """Ours: what the model predicts against what is measured, a point a step and a panel an arm, with the diagonal.

    Args:
        data: runs with tables.CALIBRATION_KEYS and tables.SCALE_KEYS.
        smooth: not used.

    Returns:
        The figure, and its table.

    Raises:
        FigureError: nothing was measured.
    """
    runs = [run for line in data.lines for run in line.runs]
    there = [
        name for name, pair in tables.PAIRS.items() if any((tables.pairs(run, *pair) > 0).all(1).any() for run in runs)
    ]
    if not there:
        raise FigureError("nothing was measured after the steps; train with capo.measure_kl=1")
    blocks = [names for symbol in ("m_F", "m_H") if (names := [name for name in there if name.startswith(symbol)])]
    numbers, table = calibration_table(data)
    columns = min(ACROSS, len(data.lines))
    rows = math.ceil(len(data.lines) / columns)
    with plt.rc_context(RC | {"axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}):
        size = (max(4.8, 1.5 * columns + 0.6), 1.75 * rows * len(blocks) + 0.8)
        figure = plt.figure(figsize=size)
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
            part.supxlabel(f"${names[0].split(' → ')[0]}$ of the step", fontsize=8.5)
            part.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2, markerscale=3)
        text = f"a point a step that was taken (at most {POINTS} an arm), both positive; dashed: predicted = measured"
        parts[-1].supxlabel(f"${names[0].split(' → ')[0]}$ of the step\n{note_of(data)}; {text}", fontsize=7.5)
    return Result(heading(data) | {"arms": numbers}, figure, table)


def calibration_panel(axis: Axes, line: Line, names: list[str]) -> None:
    """Draw an arm's steps.

    Args:
        axis: where.
        line: the arm's runs.
        names: of tables.PAIRS, with the same prediction.
    """
    for name, colour in zip(names, COLOURS, strict=False):
        both = np.concatenate([tables.pairs(run, *tables.PAIRS[name]) for run in line.runs])
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
    """Table what the model predicts against what is measured, step by step.

    Args:
        data: runs with CALIBRATION_KEYS and SCALE_KEYS.

    Returns:
        The numbers by arm, and Markdown.
    """
    rows, numbers = [], {}
    for line in data.lines:
        for label, (predicted, measured, exponent) in tables.PAIRS.items():
            seeds = [tables.pairs(run, predicted, measured, exponent) for run in line.runs]
            functions = {"slope": slope, "median_ratio": median_ratio, "spearman": stats.spearman}
            clear = [one[one[:, 1] > NOISE] for one in seeds] if "KL" in label else seeds
            found = {
                name: tables.estimate(seeds if name == "spearman" else clear, tables.pooled(function), DRAWS)
                for name, function in functions.items()
            }
            both = np.concatenate(seeds)
            found["positive"] = float((both > 0).all(1).mean()) if len(both) else float("nan")
            numbers.setdefault(line.arm.label, {})[label] = found
            cells = [tables.interval(found[name], ".2f" if name != "median_ratio" else "#.2g") for name in functions]
            rows.append([line.arm.label, label, *cells, tables.number(found["positive"], ".0%")])
        share = tables.estimate(
            [tables.pairs(run, "capo/measured_kl", "capo/measured_kl_head", 0) for run in line.runs],
            tables.pooled(median_ratio),
            DRAWS,
        )
        numbers[line.arm.label]["share of the last layer"] = share
        rows.append([line.arm.label, "KL of the last layer alone / KL", "–", tables.interval(share, "#.2g"), "–", "–"])
    header = ["arm", "predicted → measured", "slope (log-log)", "median ratio", "Spearman", "both positive"]
    notes = (
        "A step each; ratio is measured / predicted. [95 % bootstrap interval over seeds and steps.] Slope and ratio: "
        f"both positive, a KL above {NOISE:g} (rounding); Spearman: all. Skipped steps are left out. {data.seeds}."
    )
    return numbers, tables.markdown(data.experiment.title, header, rows, notes)


def note_of(data: Data) -> str:
    """The sentence below a figure that is no panel of lines: scale and seeds."""
    return f"{data.experiment.scale}; {data.seeds}"
