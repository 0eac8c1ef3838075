"""What each method survives on its grid of learning rates, and how large its steps are (ours)."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from open_r1_capo.experiments.figures import tables
from open_r1_capo.experiments.figures.curves import FAMILIES, Data, FigureError, Line, RunData
from open_r1_capo.experiments.figures.drawing import COLOURS, RC, Result, caption, heading

MARKERS = "osD^vPX"
STAGES = ((2, 10), (11, 20), (21, None))  # steps: the warm-up without its first, at rate 0; then two later stages


def stability(data: Data) -> Result:
    """Last in-training accuracy against the learning rate; a ring marks the largest rate usable with all seeds."""
    methods, numbers, table = rates_table(data)
    families: dict[str, list[str]] = {FAMILIES[start]: [] for start in ("", "dr", "rein")}
    for label, lines in methods.items():
        families[lines[0].family].append(label)
    families = {name: labels for name, labels in families.items() if labels}
    with plt.rc_context(RC):
        size = (max(4.8, 3.5 * len(families)), 4.2)
        figure, axes = plt.subplots(1, len(families), figsize=size, sharey=True, squeeze=False)
        for axis, (name, labels) in zip(axes.flat, families.items(), strict=True):
            for place, label in enumerate(labels):
                rates_panel(axis, numbers["methods"][label], label, (place, len(labels)))
            rates = sorted({rate for label in labels for rate in numbers["methods"][label]["rates"]})
            axis.axhline(numbers["base"], color="#666666", lw=1, ls=":", label="base policy")
            axis.set_xscale("log", base=2)
            ticks = [f"{r:g}" if r >= 0.1 else f"{r:.1e}".replace(".0e", "e").replace("e-0", "e-") for r in rates]
            every = 1 if len(rates) < 5 else 2
            axis.set_xticks(rates, [tick if i % every == 0 else "" for i, tick in enumerate(ticks)])
            axis.set(xlabel="learning rate (peak)", ylim=(-0.02, 1.04))
            axis.set_title(f"{name}: last in-training accuracy")
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        text = "mean ± standard error, shifted sideways; hollow: fewer seeds; ring: largest rate usable with all"
        caption(figure, f"{data.experiment.scale}; {data.seeds}; {text}")
    return Result(heading(data) | numbers, figure, table)


def rates_panel(axis: Axes, method: dict[str, Any], label: str, place: tuple[int, int]) -> None:
    """Draw the accuracies by rate of the method number place[0] of place[1], shifted so that none hides another."""
    colour, marker = COLOURS[place[0] % len(COLOURS)], MARKERS[place[0] % len(MARKERS)]
    rates = method["rates"]
    x = np.array(list(rates)) * 2 ** (0.06 * (place[0] - (place[1] - 1) / 2))
    means = [np.mean(one["last"]) for one in rates.values()]
    errors = [np.std(one["last"], ddof=1) / math.sqrt(one["n"]) if one["n"] > 1 else 0 for one in rates.values()]
    axis.errorbar(x, means, errors, label=label, marker=marker, ms=4, capsize=2, lw=1.2, color=colour)
    most = max(one["n"] for one in rates.values())
    few = [i for i, one in enumerate(rates.values()) if one["n"] < most]  # a search leaves a rate at the first failure
    axis.plot(x[few], np.array(means)[few], marker, ms=4, mfc="white", mec=colour, ls="none", zorder=3)
    if method["largest_usable"]:
        ring = list(rates).index(method["largest_usable"])
        axis.plot(x[ring], means[ring], "o", ms=11, mfc="none", mec=colour, mew=1.3)


def rates_table(data: Data) -> tuple[dict[str, list[Line]], dict[str, Any], str]:
    """What each method (a label whose arms override learning_rate) survives on its grid of learning rates.

    Returns:
        The lines of each method, in the order of their rates; the numbers by method; Markdown.

    Raises:
        FigureError: an arm without a learning rate.
    """
    base = tables.base_of(data)
    methods: dict[str, list[Line]] = {}
    for line in data.lines:
        if line.arm.value("learning_rate") is None:
            raise FigureError(f"the arm {line.arm.label!r} sets no learning_rate, which is the horizontal axis")
        methods.setdefault(line.arm.label, []).append(line)
    numbers, rows, all_of = {}, [], len(data.experiment.seeds)
    for label, lines in methods.items():
        lines.sort(key=lambda line: line.arm.value("learning_rate"))
        rates = {line.arm.value("learning_rate"): tables.outcome(line, base) for line in lines}
        largest = {
            f"largest_{verdict}": max((rate for rate, one in rates.items() if one[verdict] == all_of), default=None)
            for verdict in ("survived", "usable")
        }
        kl = max(largest_kl(run) for line in lines for run in line.runs)
        numbers[label] = {"rates": rates} | largest | {"largest_kl": kl}
        cells = [f"{rate:g}: {tables.spread(one['last'])} ({one['usable']}/{one['n']})" for rate, one in rates.items()]
        ends = (f"{rate:g}" if rate else "none" for rate in largest.values())
        rows.append([label, *ends, "; ".join(cells), tables.number(kl, ".2g")])
    header = ["method", "largest rate survived", "largest rate usable"]
    header += ["rate: last accuracy (usable seeds / n)", "largest KL of a step, nats"]
    notes = (
        f"Mean ± standard error over seeds; by all of {all_of} seeds. {tables.RULES} The base accuracy is {base:.3f}."
    )
    table = tables.markdown(data.experiment.title, header, rows, notes)
    return methods, {"base": base, "methods": numbers}, table


def largest_kl(run: RunData) -> float:
    """The largest measured KL of a run's steps, in nats; NaN if none was measured."""
    return float(max(run.series("capo/measured_kl")[1], default=float("nan")))


def step_sizes(data: Data) -> Result:
    """Table the gradient norm before clipping and the measured KL of a step, averaged over each of STAGES."""
    names = [f"{first} to {last}" if last else f"from {first}" for first, last in STAGES]
    keys, rows, numbers = {"gradient norm": "grad_norm", "KL": "capo/measured_kl"}, [], {}
    for line in data.lines:
        means = {
            name: [float(np.mean([stage_mean(run, key, *stage) for run in line.runs])) for stage in STAGES]
            for name, key in keys.items()
        }
        largest = max(map(largest_kl, line.runs))
        numbers[", ".join((line.arm.label, *line.arm.overrides))] = means | {"largest KL": largest}
        cells = [tables.number(value, ".2g") for name in keys for value in means[name]]
        rows.append([line.arm.label, ", ".join(line.arm.overrides), *cells, tables.number(largest, ".2g")])
    header = ["arm", "settings", *(f"{key}, steps {name}" for key in keys for name in names), "largest KL"]
    notes = f"Means over the steps and over seeds; KL in nats, of a whole step. {data.seeds}."
    table = tables.markdown(data.experiment.title, header, rows, notes)
    return Result(heading(data) | {"stages": names, "arms": numbers}, table=table)


def stage_mean(run: RunData, key: str, first: int, last: int | None) -> float:
    """The mean of a metric over the steps from `first` to `last`, None for the end; NaN where there is none."""
    steps, values = run.series(key)
    inside = values[(steps >= first) & (steps <= (last or np.inf))]
    return float(inside.mean()) if len(inside) else float("nan")
