"""Equal tuning: what missing the right KL budget by a factor costs, beside missing the right learning rate by it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy.stats import trim_mean

from open_r1_capo.experiments.figures import tables
from open_r1_capo.experiments.figures.curves import FAMILIES, Data, Line
from open_r1_capo.experiments.figures.drawing import BLUE, ORANGE, RC, Result, caption, finish, heading
from open_r1_capo.runs import outcomes

KEYS = ("completions/mean_length",)
KNOBS = {"share": "budget.entropy_share", "nats": "budget.nats", "rate": "learning_rate"}
UNCHANGED = 0.003  # κ of the recipes, chosen on the lab's seeds 0 and 1 (docs/protocol.md)
CLOSE = (0.02, 0.05)  # below the best rate
BATCH = "completions_per_step"


@dataclass
class Setting:
    """One base method on one task, policy and batch: the last accuracy at every value of each knob."""

    method: str
    place: str
    knobs: dict[str, dict[float, list[float]]] = field(default_factory=lambda: defaultdict(dict))  # value → seeds
    lengths: list[float] = field(default_factory=list)  # mean tokens of a completion, of each run with a budget

    def best(self, knob: str) -> tuple[float, float]:
        """The knob's best value, and its mean last accuracy; NaN without runs."""
        means = {value: float(np.mean(last)) for value, last in self.knobs[knob].items()}
        return max(means.items(), key=lambda item: item[1], default=(math.nan, math.nan))

    def cell(self, knob: str) -> str:
        """The knob's best accuracy and, in brackets, its value; – without runs."""
        value, accuracy = self.best(knob)
        return "–" if math.isnan(value) else f"{accuracy:.3f} ({value:g})"

    def within(self, knob: str, margin: float) -> tuple[int, int]:
        """How many of the knob's values end at most `margin` below the best rate, of how many."""
        _, best = self.best("rate")
        return sum(np.mean(last) >= best - margin for last in self.knobs[knob].values()), len(self.knobs[knob])

    def relative(self, knob: str) -> list[float]:
        """Mean last accuracy at every value of the knob, as a share of the best rate's."""
        return [float(np.mean(last)) / self.best("rate")[1] for last in self.knobs[knob].values()]


def equal_tuning(data: Sequence[Data]) -> Result:
    """Draw last accuracy against budget and rate, setting by setting, and table how far each can be missed."""
    settings = [one for one in collect(data) if one.knobs["share"] and one.knobs["rate"]]
    rows, numbers = [], []
    for one in settings:
        best = one.best("rate")[1]
        unchanged = float(np.mean(one.knobs["share"].get(UNCHANGED, [math.nan])))
        a_completion = one.best("nats")[0] * np.mean(one.lengths)
        close = ["{}/{}".format(*one.within(knob, CLOSE[1])) for knob in ("share", "rate")]
        rows.append([one.method, one.place, one.cell("rate"), tables.number(unchanged), f"{unchanged - best:+.3f}",
                     one.cell("share"), one.cell("nats"), tables.number(a_completion, ".2g"), *close])  # fmt: skip
        numbers.append({"method": one.method, "place": one.place, "length": float(np.mean(one.lengths))}
                       | {knob: {f"{value:g}": last for value, last in sorted(values.items())}
                          for knob, values in one.knobs.items()})  # fmt: skip
    header = ["method", "setting", "best rate", f"κ = {UNCHANGED:g}, unchanged", "difference", "best κ"]
    header += ["best nats a token", "the same a completion"]
    header += [f"budgets within {CLOSE[1]:g}", f"rates within {CLOSE[1]:g}"]
    title = data[0].experiment.title.split(";")[0]
    table = tables.markdown(title, header, rows, summary(settings))
    return Result(heading(data[0]) | {"settings": numbers}, draw(data[0], settings), table)


def collect(data: Sequence[Data]) -> list[Setting]:
    """Sort the runs of several experiments and scales into settings, in the order of their methods."""
    settings: dict[tuple[str, str], Setting] = {}
    for one in data:
        for line in one.lines:
            knob = next(name for name, key in KNOBS.items() if line.arm.value(key) is not None)
            key = (line.family, place_of(one, line))
            setting = settings.setdefault(key, Setting(*key))
            value = line.arm.value(KNOBS[knob])
            setting.knobs[knob].setdefault(value, []).extend(outcomes.last_accuracy(run.rewards) for run in line.runs)
            if knob != "rate":
                setting.lengths += [float(np.nanmean(run.columns[KEYS[0]])) for run in line.runs]
    order = list(FAMILIES.values())
    return sorted(settings.values(), key=lambda one: -order.index(one.method))


def place_of(data: Data, line: Line) -> str:
    """The name of a setting: its scale, and its batch where an arm sets it."""
    batch = line.arm.value(BATCH)
    return data.experiment.scale if batch is None else f"{data.experiment.scale}, {batch:g} a step"


def summary(settings: Sequence[Setting]) -> str:
    """The sentences below the table: how wide each knob's plateau is, and how far its best value moves."""
    text = ["Last accuracy, mean over seeds; the best value of each knob in brackets."]
    for knob, name in (("share", "budgets"), ("rate", "rates")):
        relative = [value for one in settings for value in one.relative(knob)]
        counts = np.array([one.within(knob, margin) for margin in CLOSE for one in settings])
        total = counts.reshape(len(CLOSE), -1, 2).sum(1)
        within = " and ".join(f"{n} within {m:g}" for (n, _), m in zip(total, CLOSE, strict=True))
        text.append(
            f"Of all {total[0][1]} {name}, {within} of the best rate of their setting; interquartile mean "
            f"{trim_mean(relative, 0.25):.3f} of its accuracy, worst {min(relative):.3f}."
        )
    for knob, unit in (("share", "share of the entropy"), ("nats", "nats a token"), ("rate", "learning rate")):
        best = [one.best(knob)[0] for one in settings if one.knobs[knob]]
        if len(best) > 1:
            text.append(f"The best {unit} moves by a factor of {max(best) / min(best):.0f} between settings.")
    return " ".join(text)


def draw(data: Data, settings: Sequence[Setting]) -> plt.Figure:
    """A panel a setting: last accuracy over eight rates (below) and five budgets (above), both over two decades."""
    columns = min(3, len(settings))
    rows = math.ceil(len(settings) / columns)
    with plt.rc_context(RC):
        size = (3.4 * columns, 2.9 * rows + 0.7)
        figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
        for axis, one in zip(axes.flat, settings, strict=False):
            panel(axis, one)
        for axis in axes.flat[len(settings) :]:
            axis.set_visible(False)
        finish(figure, data, "")
        caption(
            figure, "last in-training accuracy; grey: within 0.02 of the best rate; ring: the lab's budget, unchanged"
        )
    return figure


def panel(axis: Axes, one: Setting) -> None:
    """Draw one setting."""
    above = axis.twiny()
    for where, knob, colour, marker, label in (
        (axis, "rate", ORANGE, "s", "learning rate (axis below)"),
        (above, "share", BLUE, "o", "KL budget, share of the entropy (axis above)"),
    ):
        values = sorted(one.knobs[knob])
        means = [np.mean(one.knobs[knob][value]) for value in values]
        where.plot(values, means, marker=marker, ms=4, color=colour, label=label)
        where.set_xscale("log")
        where.tick_params(axis="x", which="both", colors=colour)
        where.grid(False, axis="x")
    if UNCHANGED in one.knobs["share"]:
        mean = np.mean(one.knobs["share"][UNCHANGED])
        above.plot([UNCHANGED], [mean], "o", ms=10, mfc="none", mec=BLUE, mew=1.3)
    _, best = one.best("rate")
    axis.axhspan(best - CLOSE[0], best, color="#888888", alpha=0.25, lw=0)
    axis.set_ylim(0, 1.03)
    axis.set_title(f"{one.method}, {one.place}", pad=20)
