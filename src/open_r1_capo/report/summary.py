"""What a run ended with: summary.json's numbers, and a few lines for the terminal."""

from __future__ import annotations

import math
import statistics
from typing import Any

from open_r1_capo.run_folder import RunFolder

WINDOW = 10  # steps of a reward window


def summarise(
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What the run ended with.

    Args:
        settings: the resolved recipe.
        rows: all metric lines.
        before: held-out accuracy of the base policy, with its standard error and n.
        after: the same at the end.

    Returns:
        The content of summary.json.
    """
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    windows = [statistics.fmean(rewards[i : i + WINDOW]) for i in range(0, len(rewards), WINDOW)]
    summary = {
        "recipe": settings["recipe"],
        "scale": settings["scale"],
        "seed": settings["seed"],
        "steps": rows[-1]["step"],
        "completions": rows[-1]["completions"],
        "accepted_tokens": rows[-1].get("accepted_tokens"),
        "reward_windows": [round(w, 4) for w in windows],
        "accuracy_before": before,
        "accuracy_after": after,
        # of all calls that it took, without what was done between the steps
        "training_seconds": round(sum(row.get("time/total") or 0.0 for row in rows), 1),
    }
    measured = {row["step"]: row["accuracy"] for row in rows if row.get("accuracy") is not None}
    if measured:
        best = max(measured, key=measured.get)
        summary |= {"accuracy_best": measured[best], "accuracy_best_step": best}
    for name, key in (
        ("rejected_frac", "capo/rejected_frac"),
        ("scaled_frac", "capo/scaled_frac"),
        ("measured_kl", "capo/measured_kl"),
        ("step_scale", "capo/step_scale"),
    ):
        values = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        if values:
            summary[name] = {"mean": statistics.fmean(values), "max": max(values), "min": min(values)}
    return summary


def summary_lines(folder: RunFolder) -> list[str]:
    """The result for the terminal.

    Args:
        folder: of a run that has ended.

    Returns:
        A few lines.
    """
    s = folder.finished()
    lines = [f"{s['recipe']} on {s['scale']}, seed {s['seed']}: {s['steps']} steps, {s['completions']:,} completions"]
    if s["accuracy_before"] and s["accuracy_after"]:
        b, a = s["accuracy_before"], s["accuracy_after"]
        lines.append(
            f"  held-out accuracy  {b['accuracy']:.3f} ± {b['standard_error']:.3f} before, {a['accuracy']:.3f} ± "
            f"{a['standard_error']:.3f} after (best {s['accuracy_best']:.3f} at step {s['accuracy_best_step']})"
        )
        if a["accuracy"] < b["accuracy"] - 3 * b["standard_error"]:
            lines.append(
                "  the policy collapsed   a lower learning_rate, RECIPE=capo_scale_aggressive or RECIPE=grpo_planned "
                "may keep it (docs/results.md)"
            )
    else:
        lines.append(f"  training reward    {s['reward_windows'][0]:.3f} → {s['reward_windows'][-1]:.3f}")
    if "rejected_frac" in s:
        for name, share in (("rejected", s["rejected_frac"]), ("scaled  ", s["scaled_frac"])):
            if name == "rejected" or share["max"]:
                lines.append(f"  tokens {name}    {share['mean']:.2%} on average, {share['max']:.2%} at most")
        if s["step_scale"]["min"] < 1:
            lines.append(f"  learning rate      shortened to {s['step_scale']['mean']:.2f} of the schedule on average")
    if "measured_kl" in s:
        lines.append(
            f"  KL of an update    {s['measured_kl']['mean']:.1e} on average, {s['measured_kl']['max']:.1e} at most"
        )
    return [*lines, f"  report             {folder.report}"]
