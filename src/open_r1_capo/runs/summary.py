"""What a run ended with: summary.json's numbers, and a few lines for the terminal."""

from __future__ import annotations

import math
import statistics
from typing import Any

from open_r1_capo.runs.outcomes import WINDOW
from open_r1_capo.runs.run import Run

# name in the summary → metric whose mean, largest and smallest value it holds
SPREADS = {
    "rejected_frac": "capo/rejected_frac",
    "scaled_frac": "capo/scaled_frac",
    "measured_kl": "capo/measured_kl",
    "step_scale": "capo/step_scale",
}


def finite(value: Any) -> float | int | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def summarise(
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The content of summary.json from all metric lines, at least one; values that are not numbers are left out.

    `before` and `after` are held-out accuracies, with standard error and n, of the base policy and of the last one.
    """

    def known(key: str) -> list[float]:
        return [value for row in rows if (value := finite(row.get(key))) is not None]

    rewards = known("reward")
    windows = [statistics.fmean(rewards[i : i + WINDOW]) for i in range(0, len(rewards), WINDOW)]
    summary = {
        **{key: settings.get(key) for key in ("recipe", "scale", "seed")},
        "steps": rows[-1]["step"],
        "completions": max(known("completions"), default=0),
        "accepted_tokens": max(known("accepted_tokens"), default=None),
        "reward_windows": [round(window, 4) for window in windows],
        "accuracy_before": before,
        "accuracy_after": after,
        # of all calls that it took, without what was done between the steps
        "training_seconds": round(sum(known("time/total")), 1),
    }
    accuracies = {row["step"]: value for row in rows if (value := finite(row.get("accuracy"))) is not None}
    if accuracies:
        best = max(accuracies, key=accuracies.get)
        summary |= {"accuracy_best": accuracies[best], "accuracy_best_step": best}
    for name, key in SPREADS.items():
        if values := known(key):
            summary[name] = {"mean": statistics.fmean(values), "max": max(values), "min": min(values)}
    budgeted = [row for row in rows if finite(row.get("budget/kl")) is not None]
    if budgeted:
        kls = [row["budget/kl"] for row in budgeted]
        summary["budget"] = {
            "kl": statistics.fmean(kls),
            "largest_share": max(row["budget/kl"] / row["budget/nats"] for row in budgeted),
            "passes": statistics.fmean(row["budget/passes"] for row in budgeted),
            "taken_back": int(sum(row["budget/taken_back"] for row in budgeted)),
        }
    return summary


def summary_lines(run: Run) -> list[str]:
    """The result of a run that has ended, as lines for the terminal."""
    s = run.summary
    lines = [f"{s['recipe']} on {s['scale']}, seed {s['seed']}: {s['steps']} steps, {s['completions']:,} completions"]
    if s["accuracy_before"] and s["accuracy_after"]:
        b, a = s["accuracy_before"], s["accuracy_after"]
        best = f" (best {s['accuracy_best']:.3f} at step {s['accuracy_best_step']})" if "accuracy_best" in s else ""
        lines.append(
            f"  held-out accuracy  {b['accuracy']:.3f} ± {b['standard_error']:.3f} before, {a['accuracy']:.3f} ± "
            f"{a['standard_error']:.3f} after{best}"
        )
        if a["accuracy"] < b["accuracy"] - 3 * b["standard_error"]:
            lines.append(
                "  the policy collapsed   a KL budget (RECIPE=grpo_budget) or a lower learning_rate may keep it "
                "(docs/results.md)"
            )
    elif s["reward_windows"]:
        lines.append(f"  training reward    {s['reward_windows'][0]:.3f} → {s['reward_windows'][-1]:.3f}")
    for name, share in (("rejected", s.get("rejected_frac")), ("scaled  ", s.get("scaled_frac"))):
        if share and (share["max"] or (name == "rejected" and "budget" not in s)):
            lines.append(f"  tokens {name}    {share['mean']:.2%} on average, {share['max']:.2%} at most")
    if "step_scale" in s and s["step_scale"]["min"] < 1:
        lines.append(f"  learning rate      shortened to {s['step_scale']['mean']:.2f} of the schedule on average")
    if "budget" in s:
        b = s["budget"]
        lines.append(f"  KL of a step       {b['kl']:.1e} on average, {b['largest_share']:.2f} × its budget at most")
        back = f", {b['taken_back']} steps taken back" if b["taken_back"] else ""
        lines.append(f"  measurements       {b['passes']:.1f} forward passes a step{back}")
    elif "measured_kl" in s:
        lines.append(
            f"  KL of an update    {s['measured_kl']['mean']:.1e} on average, {s['measured_kl']['max']:.1e} at most"
        )
    return [*lines, f"  report             {run.report_file}"]


def duration(seconds: float) -> str:
    """A time for people, such as `3 min 07 s` or `2 h 05 min`."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
