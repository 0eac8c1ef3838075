"""Draws any runs against each other, as the paper's Figures 2, 3 and 5 do, and tables their summaries.

Runs of the same recipe and scale are seeds of one line: its mean, with the standard error shaded.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from curves import FigureError, read_lines, warn

WINDOW = 10  # steps of the moving mean (the paper smooths with a moving average too)
PANELS = (
    ("reward", "training reward", False),
    ("accuracy", "held-out accuracy", False),
    ("capo/rejected_frac", "tokens rejected (Fig. 5)", False),
    ("capo/policy_shift/max", "largest token policy shift m_F (Fig. 3)", True),
    ("capo/batch_policy_shift", "policy shift of the step m_F (Fig. 3)", True),
    ("capo/measured_kl", "measured KL of the step (Fig. 9)", True),
)


def read_run(folder: Path) -> tuple[str, list[dict], dict]:
    """Read a run folder.

    Args:
        folder: outputs/<recipe>/<scale>/seed<seed>.

    Returns:
        The run's name (recipe and scale), its metric lines, and its summary ({} while it runs).

    Raises:
        FigureError: the folder holds no metrics, or a broken line.
    """
    path, warnings = folder / "metrics.jsonl", []
    if not path.is_file():
        raise FigureError(f"{folder} is not a run folder (no metrics.jsonl)")
    rows = read_lines(path, warnings)
    warn("runs", warnings)
    summary = folder / "summary.json"
    name = f"{folder.parent.parent.name} ({folder.parent.name})"
    return name, rows, json.loads(summary.read_text()) if summary.is_file() else {}


def smooth(values: list[float]) -> list[float]:
    """Take the mean of each value and the WINDOW - 1 before it."""
    return [statistics.fmean(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))]


def series(rows: list[dict], key: str) -> dict[int, float]:
    """Take a metric against the training completions; sparse ones (held-out accuracy) are not smoothed."""
    points = [(row["completions"], row[key]) for row in rows if row.get(key) is not None]
    values = [value for _, value in points]
    values = smooth(values) if len(points) == len(rows) else values
    return dict(zip((x for x, _ in points), values, strict=True))


def draw(runs: dict[str, list[list[dict]]], out: Path) -> Path:
    """Draw every panel.

    Args:
        runs: name → the metric lines of each seed.
        out: folder of the figure.

    Returns:
        The written PNG.
    """
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    colours = plt.get_cmap("tab10")
    for axis, (key, title, log) in zip(axes.flat, PANELS, strict=True):
        for number, (name, seeds) in enumerate(runs.items()):
            lines = [line for line in (series(rows, key) for rows in seeds) if line]
            xs = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
            mean = [statistics.fmean(line[x] for line in lines) for x in xs]
            axis.plot(xs, mean, color=colours(number), lw=1.6, label=name)
            if len(lines) > 1:
                error = [statistics.stdev(line[x] for line in lines) / math.sqrt(len(lines)) for x in xs]
                low, high = ([m + s * e for m, e in zip(mean, error, strict=True)] for s in (-1, 1))
                axis.fill_between(xs, low, high, color=colours(number), alpha=0.2, lw=0)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("training completions", fontsize=8)
        axis.grid(alpha=0.25)
        if log and any(y > 0 for line in axis.get_lines() for y in line.get_ydata()):
            axis.set_yscale("log", nonpositive="mask")
    axes.flat[1].legend(fontsize=8, frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def table(summaries: dict[str, list[dict]]) -> str:
    """Write the runs' summaries as a Markdown table.

    Args:
        summaries: name → the summary of each seed that has ended.

    Returns:
        The table; means over seeds.
    """
    lines = [
        "| run | seeds | accuracy before | best | last | rejected mean | rejected max | largest measured KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in summaries.items():
        if not seeds:
            continue

        def mean(*path: str, seeds: list[dict] = seeds, form: str = "{:.3f}") -> str:
            values = []
            for seed in seeds:
                value = seed
                for key in path:
                    value = value.get(key) if isinstance(value, dict) else None
                values.append(value)
            known = [value for value in values if value is not None]
            return form.format(statistics.fmean(known)) if known else "–"

        cells = [
            mean("accuracy_before", "accuracy"), mean("accuracy_best"), mean("accuracy_after", "accuracy"),
            mean("rejected_frac", "mean", form="{:.2%}"), mean("rejected_frac", "max", form="{:.2%}"),
            mean("measured_kl", "max", form="{:.1e}"),
        ]  # fmt: skip
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def against_each_other(folders: list[Path], out: Path) -> None:
    """Draw and table runs, and put their summaries into runs.json.

    Args:
        folders: of the runs.
        out: folder of runs.png, runs.md and runs.json.

    Raises:
        FigureError: a folder is not a run's.
    """
    rows, summaries = defaultdict(list), defaultdict(list)
    for folder in folders:
        name, lines, summary = read_run(folder)
        rows[name].append(lines)
        summaries[name] += [summary] if summary else []
    path = draw(rows, out)
    (out / "runs.md").write_text(table(summaries))
    (out / "runs.json").write_text(json.dumps(summaries, indent=1) + "\n")
    print(table(summaries), end="")
    print(f"drawn in {path}")
