"""One figure: what no step can reach, how tight each inequality is, and where the neglected terms matter."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from open_r1_capo.experiments.figures.drawing import BLUE, CYCLE, GREEN, RC, RED, caption
from open_r1_capo.experiments.theorem.measure import Found
from open_r1_capo.experiments.theorem.selection import VARIANTS, largest_share

SMALLEST = 1e-6  # of a ratio that is drawn
BINS = 8  # of r


def draw(found: Found, content: dict[str, Any]) -> Figure:
    """Four panels."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.6), width_ratios=(1, 1.15))
        discounted(axes[0, 0], found)
        finite(axes[1, 0], found)
        tightness(axes[0, 1], content["steps"])
        neglected(axes[1, 1], found)
        caption(figure, f"{content['instances']} random softmax problems, float64, seed {content['seed']}")
    return figure


def _points(found: Found, finite: bool) -> tuple[np.ndarray, np.ndarray]:
    """γ or T of every instance, and the best of its steps' gᵀΔθ / (C √m_F)."""
    rows = [row for row in found.rows if (row["family"].horizon > 1) == finite and row["family"].horizon != 1]
    x = [torch.full_like(row["best"], row["family"].horizon) if finite else row["discount"] for row in rows]
    if not rows:
        return np.zeros(0), np.zeros(0)
    return torch.cat(x).numpy(), torch.cat([row["best"] for row in rows]).numpy()


def discounted(axis: Axes, found: Found) -> None:
    """The best step of each discounted problem, below (1 − γ) / (2 γ)."""
    x, y = _points(found, finite=False)
    axis.plot(x, y, "o", color=BLUE, ms=2, alpha=0.5, mew=0, rasterized=True, label="best step of a problem")
    grid = np.linspace(0.06, 0.995, 300)
    axis.plot(grid, [largest_share(g, 0) for g in grid], color=RED, label="(1 − γ) / (2γ): no step can do better")
    axis.axhline(1, color="k", lw=0.9, ls="--")
    axis.text(0.99, 1.15, "needed for the guarantee", fontsize=7.5, ha="right")
    axis.set(yscale="log", ylim=(1e-3, 30), xlabel="γ", ylabel="largest ω / (C √δ_F)")
    axis.set_title("Discounted: nothing to accept above γ = 1/3")
    axis.legend(loc="lower left", markerscale=2.5)


def finite(axis: Axes, found: Found) -> None:
    """The best step of each problem of T tokens, below √(6 / ((T − 1)(2T − 1)))."""
    x, y = _points(found, finite=True)
    axis.plot(x, y, "o", color=BLUE, ms=2, alpha=0.5, mew=0, rasterized=True, label="best step of a problem")
    grid = np.unique(np.geomspace(2, 1024, 60).astype(int))
    axis.plot(grid, [largest_share(1.0, int(t)) for t in grid], color=RED, label="√(6 / ((T − 1)(2T − 1)))")
    axis.axhline(1, color="k", lw=0.9, ls="--")
    last = largest_share(1.0, 1024)
    axis.annotate(f"T = 1024: {last:.4f}", (1024, last), (150, last / 2.2), fontsize=7.5)
    axis.set(xscale="log", yscale="log", ylim=(3e-4, 5), xlabel="T, tokens of a completion")
    axis.set_ylabel("largest ω / (C √δ_F)")
    axis.set_title("Finite horizon: nothing to accept from T = 3 on")
    axis.legend(loc="lower left", markerscale=2.5)


def tightness(axis: Axes, steps: dict[str, dict[str, Any]]) -> None:
    """Median and worst ratio of every claim about any step; those that were violated in red."""
    names = [name for name, one in steps.items() if one["worst"] is not None]
    for y, name in enumerate(reversed(names)):
        one, colour = steps[name], RED if steps[name]["violated"] else BLUE
        median, worst = (max(one[key], SMALLEST) for key in ("median", "worst"))
        axis.plot([median, worst], [y, y], color=colour, lw=1.2, alpha=0.6)
        axis.plot(median, y, "o", color=colour, ms=4, mfc="white")
        axis.plot(worst, y, "o", color=colour, ms=4)
    axis.axvline(1, color="k", lw=0.9, ls="--")
    axis.set(xscale="log", xlabel="used / allowed: ○ median, ● worst (left edge: 1e-6 or less)")
    axis.set_yticks(range(len(names)), [f"Eq. {n}" if n[0].isdigit() else n for n in reversed(names)], fontsize=7)
    axis.set_title("How tight each inequality is")


def neglected(axis: Axes, found: Found) -> None:
    """The share of steps that gain less than ω, by r, for every reading of the theorem."""
    edges = np.geomspace(1e-2, 3.0, BINS + 1)
    middles = np.sqrt(edges[1:] * edges[:-1])
    for variant, (colour, dashes) in zip(VARIANTS, CYCLE, strict=False):
        parts = [row["variants"][variant.name] for row in found.rows]
        radius, below = (torch.cat([part[name] for part in parts]).numpy() for name in ("radius", "below"))
        place = np.clip(np.digitize(radius, edges) - 1, 0, BINS - 1)
        share = [below[place == i].mean() if (place == i).any() else np.nan for i in range(BINS)]
        style = {"color": colour, "ls": (0, dashes) if dashes else "-", "label": variant.name}
        axis.plot(middles, share, marker="o", ms=3, **style)
    axis.axhline(0, color=GREEN, lw=0.6)
    axis.set(xscale="log", xlabel="r, norm of the longest candidate step", ylabel="share of steps with gain < ω")
    axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
    axis.set_title("Where the neglected terms matter")
    axis.legend(loc="upper left", fontsize=7.5)
