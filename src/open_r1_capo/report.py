"""What a run has shown: summary.json's numbers, a few lines for the terminal, and report.html with the curves."""

from __future__ import annotations

import html
import io
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from omegaconf import OmegaConf

from open_r1_capo.run_folder import RunFolder, write_atomically

WINDOW = 10  # steps of a reward window
MAIN, SECOND, MUTED = "#1f5fa8", "#c8501e", "#9aa5b1"


def summarise(
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    seconds: float,
) -> dict[str, Any]:
    """What the run ended with.

    Args:
        settings: the resolved recipe.
        rows: all metric lines.
        before: held-out accuracy of the base policy, with its standard error and n.
        after: the same at the end.
        seconds: training time of this call.

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
        "training_seconds": round(seconds, 1),
    }
    measured = {row["step"]: row["accuracy"] for row in rows if "accuracy" in row}
    if measured:
        best = max(measured, key=measured.get)
        summary |= {"accuracy_best": measured[best], "accuracy_best_step": best}
    for name, key in (
        ("rejected_frac", "capo/rejected_frac"),
        ("scaled_frac", "capo/scaled_frac"),
        ("measured_kl", "capo/measured_kl"),
        ("step_scale", "capo/step_scale"),
    ):
        values = [row[key] for row in rows if row.get(key) is not None]
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


def write_report(folder: RunFolder, settings: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write report.html: the result, the curves over training completions, and the settings; one file, no network.

    Args:
        folder: of the run.
        settings: the resolved recipe.
        summary: from `summarise`.
    """
    rows = folder.read_metrics()
    title = f"{settings['recipe']} · {settings['scale']} · seed {settings['seed']}"
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(_text(v))}</td></tr>" for k, v in summary.items())
    page = PAGE.format(
        title=html.escape(title),
        cells=cells,
        curves=_curves(rows, folder.read_evaluations()),
        settings=html.escape(OmegaConf.to_yaml(OmegaConf.create(settings))),
    )
    write_atomically(Path(folder.report), page)


def _curves(rows: list[dict[str, Any]], tests: list[dict[str, Any]]) -> str:
    """The panels as one inline SVG; TEST (App. G, M) below them, if checkpoints have been evaluated."""
    figure, grid = plt.subplots(4 if tests else 3, 2, figsize=(11, 12.5 if tests else 9.5), constrained_layout=True)
    axes = grid[:3]
    for axis, key in zip(grid[3] if tests else (), ("completions", "accepted_tokens"), strict=False):
        known = [test for test in tests if test.get(key) is not None]  # plain TRL counts no accepted tokens
        x, y, error = ([test[name] for test in known] for name in (key, "test", "test_stderr"))
        axis.errorbar(x, y, error, color=MAIN, marker="o", ms=4, lw=1.3, capsize=2)
        axis.set_title(f"TEST, mean of {tests[-1]['over']} test sets", fontsize=10, loc="left")
        axis.set_xlabel(f"training {key.replace('_', ' ')}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    x = [row["completions"] for row in rows]
    panel = _Panel(rows, x)
    reward, rejected, policy, objective, kl, norm = axes.flat
    panel.line(reward, "reward", MUTED, "reward of a step", width=0.8)
    panel.smooth(reward, "reward", MAIN, f"mean of {WINDOW} steps")
    panel.line(reward, "accuracy", SECOND, "held-out accuracy", marker="o")
    panel.finish(reward, "Reward and held-out accuracy", low=0)
    for key, colour, label in (
        ("capo/rejected_frac", MAIN, "rejected"),
        ("capo/rejected_frac_policy", SECOND, "by the policy bound"),
        ("capo/rejected_frac_objective", MUTED, "by the objective bound"),
        ("capo/scaled_frac", "#3c8c54", "scaled down"),
    ):
        panel.line(rejected, key, colour, label, percent=True)
    panel.finish(rejected, "Tokens rejected, %", low=0)
    for axis, name in ((policy, "policy_shift"), (objective, "objective_shift")):
        panel.line(axis, f"capo/{name}/max", SECOND, "largest token")
        panel.line(axis, f"capo/{name}/p99", MAIN, "99th percentile")
        panel.line(axis, f"capo/batch_{name}", MUTED, "whole step")
    panel.finish(policy, "Policy shift m_F (nats)", log=True)
    panel.finish(objective, "Objective shift |m_H|", log=True)
    panel.line(kl, "capo/measured_kl", MAIN, "measured KL")
    panel.line(kl, "capo/batch_policy_shift", MUTED, "predicted at the scheduled rate")
    panel.finish(kl, "KL of the update (nats)", log=True)
    panel.line(norm, "grad_norm", MAIN, "gradient norm before clipping")
    panel.line(norm, "entropy", SECOND, "entropy (nats a token)")
    panel.line(norm, "capo/step_scale", MUTED, "share of the scheduled rate")
    panel.finish(norm, "Gradient norm, entropy, step", log=True)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue().partition("?>")[2].partition(">")[2]  # without the XML and DOCTYPE headers


def main(argv: list[str] | None = None) -> int:
    """Write the reports of finished runs again.

    Args:
        argv: run folders; None takes the process's arguments.

    Returns:
        0, or 2 if a folder holds no finished run (one sentence says which).
    """
    folders = [RunFolder(Path(name)) for name in (sys.argv[1:] if argv is None else argv)]
    if not folders:
        print("error: name a run folder: make report RUN=outputs/<recipe>/<scale>/seed<seed>", file=sys.stderr)
        return 2
    for folder in folders:
        if folder.finished() is None:
            print(f"error: {folder.path} holds no finished run (no summary.json)", file=sys.stderr)
            return 2
        settings = OmegaConf.to_container(OmegaConf.load(folder.config))
        write_report(folder, settings, folder.finished())
        print("\n".join(summary_lines(folder)))
    return 0


class _Panel:
    """Draws metric columns that exist."""

    def __init__(self, rows: list[dict[str, Any]], x: list[float]):
        self.rows, self.x = rows, x

    def line(self, axis, key, colour, label, *, width=1.3, marker=None, percent=False):
        points = [(x, abs(row[key])) for x, row in zip(self.x, self.rows, strict=True) if row.get(key) is not None]
        if points and (not key.endswith("scaled_frac") or any(y for _, y in points)):
            xs, ys = zip(*points, strict=True)
            ys = [100 * y for y in ys] if percent else ys
            axis.plot(xs, ys, color=colour, lw=width, label=label, marker=marker, ms=4)

    def smooth(self, axis, key, colour, label):
        points = [(x, row[key]) for x, row in zip(self.x, self.rows, strict=True) if row.get(key) is not None]
        values = [value for _, value in points]
        means = [statistics.fmean(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))]
        axis.plot([x for x, _ in points], means, color=colour, lw=2, label=label)

    def finish(self, axis, title, log=False, low=None):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("training completions", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        positive = any(y > 0 for line in axis.get_lines() for y in line.get_ydata())
        if log and positive:
            axis.set_yscale("log", nonpositive="mask")
        if low is not None:
            axis.set_ylim(bottom=low)
        if axis.get_lines():
            axis.legend(fontsize=8, frameon=False)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "  ".join(_text(v) for v in value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #e3e8ee; vertical-align: top; }}
th {{ font-weight: 600; white-space: nowrap; }}
svg {{ width: 100%; height: auto; }}
pre {{ background: #f5f7f9; padding: 1rem; overflow-x: auto; font-size: 13px; }}
</style></head><body>
<h1>{title}</h1>
<table>{cells}</table>
{curves}
<h2>Settings</h2>
<pre>{settings}</pre>
</body></html>
"""


if __name__ == "__main__":
    sys.exit(main())
