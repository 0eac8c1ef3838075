"""What the page says beside the curves: the result in a few figures, where the time went, and the steps to look at."""

from __future__ import annotations

import statistics
from typing import Any

# rows of the paper's Table 1, as far as a step has them: the metric, and what it covers
TIMES = (
    ("generate", "generation", "sampling the completions"),
    ("reward", "reward", "scoring them"),
    ("curvature", "curvature", "CAPO: support, proposed steps, shifts, selection, commit"),
    ("measure", "measure", "the true KL after the step (capo.measure_kl)"),
    ("train", "train", "forward and backward passes, optimizer, the rest"),
    ("total", "total", "the whole step"),
)
WORST = 3  # steps a criterion
AROUND = 3  # steps whose mean reward is compared before and after a step


def time_breakdown(columns: dict[str, list]) -> list[dict[str, Any]]:
    """Mean seconds a step, by what they were spent on.

    Args:
        columns: metric columns.

    Returns:
        Rows with `name`, `what`, `seconds` and `share` of the total; empty if no time was logged. A step on
        completions of an earlier one spent no time on generating.
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
    """The steps at which a run is worth looking at.

    Args:
        columns: metric columns.

    Returns:
        Criteria with `name`, `percent` and `steps`, up to WORST pairs (step, value) each, the worst first; a criterion
        that the run has no metric for is left out.
    """
    criteria = (
        ("largest measured KL (nats)", columns.get("capo/measured_kl"), False),
        ("most tokens rejected", columns.get("capo/rejected_frac"), True),
        ("largest gradient norm", columns.get("grad_norm"), False),
        (f"largest fall of the reward (mean of {AROUND} steps after it − before)", _falls(columns), False),
    )
    found = []
    for name, values, percent in criteria:
        points = [(step, v) for step, v in zip(columns.get("step", ()), values or (), strict=False) if v]
        worst = sorted(points, key=lambda point: -abs(point[1]))[:WORST]
        if worst:
            found.append({"name": name, "percent": percent, "steps": worst})
    return found


def _falls(columns: dict[str, list]) -> list[float | None]:
    """How far the reward fell after each step; the reward of a step is that of the policy before it."""
    rewards = columns.get("reward", [])
    falls: list[float | None] = []
    for i in range(len(rewards)):
        before, after = _known(rewards[max(0, i - AROUND + 1) : i + 1]), _known(rewards[i + 1 : i + 1 + AROUND])
        change = statistics.fmean(after) - statistics.fmean(before) if before and after else 0.0
        falls.append(change if change < 0 else None)
    return falls


def tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The result in a few figures.

    Args:
        summary: from `summarise`, or {} before the first step.

    Returns:
        Triples of a label, a value and a note.
    """
    if not summary:
        return []
    found = [("optimizer steps", f"{summary['steps']:,}", f"{summary['completions']:,} completions")]
    before, after, best = (summary.get(f"accuracy_{name}") for name in ("before", "after", "best"))
    if before and after:
        note = f"from {before['accuracy']:.3f} ± {before['standard_error']:.3f}"
        note += "" if best is None else f"; best {best:.3f} at step {summary['accuracy_best_step']}"
        found.append(("held-out accuracy", f"{after['accuracy']:.3f} ± {after['standard_error']:.3f}", note))
    windows = summary.get("reward_windows")
    if windows:
        found.append(("training reward", f"{windows[-1]:.3f}", f"last steps; the first ones {windows[0]:.3f}"))
    for key, label in (("rejected_frac", "tokens rejected"), ("scaled_frac", "tokens scaled down")):
        share = summary.get(key)
        if share and (key == "rejected_frac" or share["max"]):
            found.append((label, f"{share['mean']:.2%}", f"of a step on average; {share['max']:.2%} at most"))
    kl, scale = summary.get("measured_kl"), summary.get("step_scale")
    if kl:
        found.append(("measured KL of a step", f"{kl['mean']:.1e}", f"nats on average; {kl['max']:.1e} at most"))
    if scale and scale["min"] < 1:
        found.append(
            ("learning rate taken", f"× {scale['mean']:.2f}", f"of the schedule; {scale['min']:.2g} at least")
        )
    if summary.get("training_seconds"):
        accepted = summary.get("accepted_tokens")
        note = "" if accepted is None else f"{accepted:,} accepted tokens"
        found.append(("training time", _duration(summary["training_seconds"]), note))
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]
