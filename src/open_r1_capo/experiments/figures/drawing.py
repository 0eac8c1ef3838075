"""How the figures look: panels of lines with their standard error, a legend, and a sentence on what is shown.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; the line styles differ in grey print, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from open_r1_capo.experiments.figures import published, stats
from open_r1_capo.experiments.figures.curves import TEST, Data, Line

LIMIT = 200_000  # bytes of a figure's JSON
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, BLACK = "#56B4E9", "#CC79A7", "#000000"
DASH, DOT, MIX = (5, 2), (1.2, 1.4), (6, 1.6, 1.2, 1.6)  # in line widths
# a method's (colour, dashes) in every figure; CAPO's are solid, their base methods dashed
STYLES = {
    "grpo_conservative": (BLACK, DOT),
    "grpo_aggressive": (RED, DASH),
    "drgrpo_aggressive": (ORANGE, DASH),
    "reinforce_aggressive": (PINK, DASH),
    "capo_aggressive": (BLUE, None),
    "drcapo_aggressive": (SKY, None),
    "reincapo_aggressive": (GREEN, None),
    "capo_scale_aggressive": (SKY, MIX),
    "grpo_planned": (GREEN, MIX),
}
COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)
CYCLE = [(colour, dashes) for dashes in (None, DASH, DOT, MIX) for colour in COLOURS]
RC = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8.5, "legend.frameon": False, "legend.handlelength": 3.0, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.grid": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.6, "figure.constrained_layout.use": True,
    "svg.fonttype": "none", "svg.hashsalt": "open-r1-capo",
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    key: str  # a metric, or TEST
    title: str
    x: str = "completions"  # a cumulative column
    scale: str = "linear"  # of the vertical axis: matplotlib's name, or percent
    smooth: bool = True  # whether --smooth applies; not where spikes are the point, never to TEST
    shows: Callable[[Line], bool] = lambda line: True
    # recipe → the paper's points, drawn at its scale only
    published: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


@dataclass
class Result:
    """What a figure's function returns."""

    numbers: dict[str, Any]  # what is drawn or tabled, for <name>.json
    figure: Figure | None = None  # for <name>.png and .svg
    table: str | None = None  # Markdown, for <name>.md


def look(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Colour and dashes of each line for `Axes.plot`: by method if every one is known and unique, else in order."""
    recipes = {line.arm.label: line.arm.recipe for line in lines}  # the arms of a grid share label and looks
    known = len(set(recipes.values())) == len(recipes) and set(recipes.values()) <= STYLES.keys()
    pairs = {
        label: STYLES[recipe] if known else CYCLE[i % len(CYCLE)] for i, (label, recipe) in enumerate(recipes.items())
    }
    chosen = (pairs[line.arm.label] for line in lines)
    return [{"color": colour, "ls": (0, dashes) if dashes else "-"} for colour, dashes in chosen]


def curve(line: Line, panel: Panel, smooth: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An arm's x (S,), mean over seeds (S,) and its standard error (S,), at the steps that all seeds have."""
    weight, series = (smooth if panel.smooth and panel.key != TEST else 0.0), []
    for run in line.runs:
        steps, values = run.series(panel.key)
        series.append(dict(zip(steps.astype(int).tolist(), stats.ema(values, weight).tolist(), strict=True)))
    steps, mean, error = stats.mean_and_error(series)
    x = np.array([np.mean([run.at(panel.x, step) for run in line.runs]) for step in steps.tolist()], dtype=float)
    known = ~np.isnan(x)
    return x[known], mean[known], error[known]


def draw_panel(axis: Axes, data: Data, panel: Panel, smooth: float) -> list[dict[str, Any]]:
    """Draw every arm that a panel shows; returns label, n, x, mean and se of each."""
    drawn = []
    for line, style in zip(data.lines, look(data.lines), strict=True):
        if not panel.shows(line):
            continue
        x, mean, error = curve(line, panel, smooth)
        if panel.scale == "log":
            mean = np.where(mean > 0, mean, np.nan)  # a gap: no logarithm
        thin = {"lw": 1.0, "alpha": 0.85} if not panel.smooth and panel.key != TEST else {}
        marks = {"marker": "o", "ms": 2.5} if panel.key == TEST else {}
        axis.plot(x, mean, label=line.arm.label, **style, **thin, **marks)
        if not np.isnan(error).all():
            low = np.maximum(mean - error, mean / 10) if panel.scale == "log" else mean - error
            axis.fill_between(x, low, mean + error, color=style["color"], alpha=0.15, lw=0)
        points = panel.published.get(line.arm.recipe, ()) if data.experiment.scale == published.SCALE else ()
        if points:
            axis.plot(*zip(*points, strict=True), "D", mfc="none", color=style["color"], ms=5, label="_paper")
        columns = {"x": x, "mean": mean, "se": error}
        drawn.append({"label": line.arm.label, "n": len(line.runs), **columns})
    axis.set_title(panel.title)
    axis.set_xlabel(panel.x.replace("_", " ") if panel.x != "completions" else "training completions")
    scale_axes(axis, panel, drawn)
    return drawn


def scale_axes(axis: Axes, panel: Panel, drawn: Sequence[Mapping[str, Any]]) -> None:
    """Set the scales: horizontally a logarithm where the arms differ in length, vertically the panel's."""
    places, first = [arm["x"] for arm in drawn if len(arm["x"])], 0
    if places and max(x[-1] for x in places) > 2.5 * min(x[-1] for x in places):  # else short arms are squeezed
        x = np.concatenate(places)
        if x.min() > 0:
            axis.set_xscale("log")
        else:  # the base policy's TEST, at 0
            first = x[x > 0].min()
            axis.set_xscale("symlog", linthresh=first, linscale=0.4)
    axis.xaxis.set_major_formatter(lambda x, _: "" if 0 < x < first else thousands(x))
    axis.xaxis.set_minor_formatter("")
    means = np.concatenate([arm["mean"] for arm in drawn]) if drawn else np.zeros(0)
    values = np.abs(means[means != 0])
    if panel.scale == "log" and len(values):
        axis.set_yscale("log", nonpositive="mask")
    elif panel.scale == "symlog" and len(values):
        axis.set_yscale("symlog", linthresh=10 ** math.floor(np.log10(np.quantile(values, 0.25))))
    elif panel.scale == "percent":
        axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")


def from_zero(panel: Panel, drawn: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a panel's vertical axis begins at 0: accuracies, shares, and a symlog without negative values."""
    lowest = min((arm["mean"].min() for arm in drawn if len(arm["mean"])), default=0)
    return panel.key in ("reward", TEST) or panel.scale == "percent" or (panel.scale == "symlog" and lowest >= 0)


def thousands(x: float) -> str:
    """Write 9600 as 9.6k and 1000000 as 1M."""
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"


def draw(data: Data, panels: Sequence[Panel], columns: int, smooth: float) -> Result:
    """Draw panels row by row; `smooth` is the weight of the moving average over steps, 0 for none."""
    rows = math.ceil(len(panels) / columns)
    with plt.rc_context(RC):
        size = (max(3.4 * columns, 4.8), (2.7 if columns > 1 else 3.2) * rows + 0.8)
        same = len({panel.key for panel in panels}) == 1
        figure, axes = plt.subplots(rows, columns, figsize=size, sharey=same, squeeze=False)
        shown = []
        for axis, panel in zip(axes.flat, panels, strict=False):
            arms = draw_panel(axis, data, panel, smooth)
            shown.append({"title": panel.title, "key": panel.key, "x": panel.x, "arms": arms})
        for axis, panel, one in zip(axes.flat, panels, shown, strict=False):
            if from_zero(panel, one["arms"]):  # after all are drawn: it fixes the top of an axis that they share
                axis.set_ylim(bottom=0)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        finish(figure, data, note(data, panels, smooth))
    numbers = {"smoothing": smooth or None, "panels": shown}
    return Result(heading(data) | numbers, figure)


def note(data: Data, panels: Sequence[Panel], smooth: float) -> str:
    """The sentence below a figure of curves: smoothing, seeds, the shaded error, and the paper's marks."""
    smoothed = [panel for panel in panels if smooth and panel.smooth and panel.key != TEST]
    text = f"exponential moving average over steps, weight {smooth:g}" if smoothed else "not smoothed"
    if smoothed and len(smoothed) < len(panels):
        titles = ", ".join(panel.title for panel in smoothed)
        text += " (not TEST)" if all(panel.smooth or panel.key == TEST for panel in panels) else f" ({titles})"
    error = " ± standard error" if any(len(line.runs) > 1 for line in data.lines) else ""
    paper = data.experiment.scale == published.SCALE and any(panel.published for panel in panels)
    marks = "; ◇ read off the paper" if paper else ""
    return f"{data.experiment.scale}; {text}; mean{error}, {data.seeds}{marks}"


def finish(figure: Figure, data: Data, text: str) -> None:
    """Add one legend for all lines, and the sentence `text` below."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = [line.arm.label for line in data.lines if line.arm.label in handles]
    order = list(dict.fromkeys([*order, *handles]))
    width = figure.get_size_inches()[0]
    longest = max(map(len, order), default=1)
    columns = max(1, min(len(order), int(width / (0.075 * longest + 0.62))))
    figure.legend([handles[label] for label in order], order, loc="outside upper left", ncols=columns)
    caption(figure, text)


def caption(figure: Figure, text: str) -> None:
    """Put a sentence below a figure, in small print."""
    figure.supxlabel(text, fontsize=7, color="#444444", x=0.01, ha="left", wrap=True)


def heading(data: Data) -> dict[str, Any]:
    """What every figure's JSON begins with."""
    experiment = data.experiment
    return {"name": experiment.name, "title": experiment.title, "scale": experiment.scale, "seeds": data.seeds}


def compact(value: Any) -> Any:
    """Round numbers to four significant digits; NaN and ∞ become null, arrays lists."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [compact(item) for item in value]
    if isinstance(value, float | np.floating):
        rounded = float(f"{value:.4g}")
        return None if not math.isfinite(rounded) else int(rounded) if rounded.is_integer() else rounded
    return value


def thinned(numbers: dict[str, Any], every: int) -> dict[str, Any]:
    """Keep every n-th point of each drawn line, and its last."""

    def keep(arm: dict[str, Any]) -> dict[str, Any]:
        return {k: [*v[:-1][::every], v[-1]] if isinstance(v, list) and v else v for k, v in arm.items()}

    panels = [panel | {"arms": [keep(arm) for arm in panel["arms"]]} for panel in numbers["panels"]]
    return numbers | {"panels": panels, "every": every}


def save(result: Result, name: str, out: Path) -> list[Path]:
    """Write <name>.png, .svg, .md and .json into `out`, those that the result has; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    if result.figure is not None:
        paths = [out / f"{name}.png", out / f"{name}.svg"]
        with plt.rc_context(RC):
            result.figure.savefig(paths[0], dpi=160)
            result.figure.savefig(paths[1], metadata={"Date": None})
        plt.close(result.figure)
    if result.table is not None:
        paths.append(out / f"{name}.md")
        paths[-1].write_text(result.table)
    numbers, every = compact(result.numbers), 1
    text = json.dumps(numbers, ensure_ascii=False, separators=(",", ":"))
    while len(text.encode()) > LIMIT and "panels" in numbers and every < 64:
        every *= 2
        text = json.dumps(thinned(numbers, every), ensure_ascii=False, separators=(",", ":"))
    paths.append(out / f"{name}.json")
    paths[-1].write_text(text + "\n")
    return paths
