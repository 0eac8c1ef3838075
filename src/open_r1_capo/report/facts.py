"""What the page shows beside the curves: the result in a few figures, the time by activity, the steps to look at.

`columns` are metric columns: name → a number or None for each step.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from open_r1_capo.report.panels import STEP_KL
from open_r1_capo.runs.summary import duration

# rows of the paper's Table 1, as far as a step has them: the metric, and what it covers
TIMES = (
    ("generate", "generation", "sampling the completions"),
    ("reward", "reward", "scoring them"),
    ("curvature", "curvature", "CAPO: support, proposed steps, shifts, selection, commit"),
    ("measure", "measure", "the KL of the step after it was taken (capo.measure_kl, budget.share)"),
    ("train", "train", "forward and backward passes, optimizer, the rest"),
    ("total", "total", "the whole step"),
)
WORST = 3  # steps a criterion
AROUND = 3  # steps whose mean reward is compared before and after a step


def time_breakdown(columns: dict[str, list]) -> list[dict[str, Any]]:
    """Mean seconds per step by what they were spent on: rows with `name`, `what`, `seconds` and `share` of the total.

    The mean includes steps on completions of an earlier step, which spent no time on generation. Empty if no time was
    logged.
    """
    total = _known(columns.get("time/total", ()))
    if not total or not sum(total):
        return []
    rows = []
    for key, name, what in TIMES:
        spent = _known(columns.get(f"time/{key}", ()))
        if spent:
            seconds = sum(spent) / len(total)
            rows.append({"name": name, "what": what, "seconds": seconds, "share": sum(spent) / sum(total)})
    return rows


def worst_steps(columns: dict[str, list]) -> list[dict[str, Any]]:
    """The steps worth a look: each criterion with `name`, `percent` and `steps`, its WORST pairs (step, value)."""
    criteria = (
        ("largest measured KL (nats)", columns.get(STEP_KL), False),
        ("most tokens rejected", columns.get("capo/rejected_frac"), True),
        ("largest gradient norm", columns.get("grad_norm"), False),
        (f"largest fall of the reward (mean of {AROUND} steps after it − before)", _falls(columns), False),
    )
    rows = []
    for name, values, percent in criteria:
        points = [(step, v) for step, v in zip(columns.get("step", ()), values or (), strict=False) if v]
        worst = sorted(points, key=lambda point: -abs(point[1]))[:WORST]
        if worst:
            rows.append({"name": name, "percent": percent, "steps": worst})
    return rows


def _falls(columns: dict[str, list]) -> list[float | None]:
    """How far the reward fell after each step; a step's reward is that of the policy before it."""
    rewards = columns.get("reward", [])
    falls: list[float | None] = []
    for i in range(len(rewards)):
        before, after = _known(rewards[max(0, i - AROUND + 1) : i + 1]), _known(rewards[i + 1 : i + 1 + AROUND])
        change = statistics.fmean(after) - statistics.fmean(before) if before and after else 0.0
        falls.append(change if change < 0 else None)
    return falls


def tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The result in a few figures: triples of a label, a value and a note; none for an empty summary."""
    if not summary:
        return []
    shown = [("optimizer steps", f"{summary['steps']:,}", f"{summary['completions']:,} completions")]
    before, after, best = (summary.get(f"accuracy_{name}") for name in ("before", "after", "best"))
    if before and after:
        note = f"from {before['accuracy']:.3f} ± {before['standard_error']:.3f}"
        note += "" if best is None else f"; best {best:.3f} at step {summary['accuracy_best_step']}"
        shown.append(("held-out accuracy", f"{after['accuracy']:.3f} ± {after['standard_error']:.3f}", note))
    if windows := summary.get("reward_windows"):
        shown.append(("training reward", f"{windows[-1]:.3f}", f"last steps; the first ones {windows[0]:.3f}"))
    for key, label in (("rejected_frac", "tokens rejected"), ("scaled_frac", "tokens scaled down")):
        share = summary.get(key)
        if share and (key == "rejected_frac" or share["max"]):
            shown.append((label, f"{share['mean']:.2%}", f"of a step on average; {share['max']:.2%} at most"))
    if budget := summary.get("budget"):
        note = f"nats on average; {budget['largest_share']:.2f} × its budget at most"
        shown.append(("measured KL of a step", f"{budget['kl']:.1e}", note))
    elif kl := summary.get("measured_kl"):
        shown.append(("measured KL of a step", f"{kl['mean']:.1e}", f"nats on average; {kl['max']:.1e} at most"))
    factor = summary.get("step_scale")
    if factor and factor["min"] < 1:
        note = f"of the schedule; {factor['min']:.2g} at least"
        shown.append(("learning rate taken", f"× {factor['mean']:.2f}", note))
    if summary.get("training_seconds"):
        accepted = summary.get("accepted_tokens")
        note = "" if accepted is None else f"{accepted:,} accepted tokens"
        shown.append(("training time", duration(round(summary["training_seconds"])), note))
    return shown


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
