"""The curves of a page as plain data: which metrics share a panel, and the columns that they are drawn from.

The page's script only draws. A run is two tables of columns, `metrics` (a row an optimizer step) and `tests` (a row an
evaluated step); a line names a column of one of them, and a panel is a list of lines.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

from open_r1_capo.runs.outcomes import WINDOW
from open_r1_capo.runs.summary import finite

AXES = {
    "completions": "training completions",
    "step": "optimizer steps",
    "accepted_tokens": "training accepted tokens",
}
TEST_COLUMNS = ("step", "completions", "accepted_tokens", "test", "test_stderr", "over")  # of eval.jsonl
TIMES = ("train", "generate", "total", "reward", "measure", "curvature")  # in the colours of the palette
MEAN = "reward, running mean"
TAKEN = "learning rate taken"
STEP_KL = "KL of the step"
RUN_COLOURS = (0, 1, 6, 4, 5, 3, 7, 2)
DIGITS = 5  # significant, of a number on the page


@dataclass(frozen=True)
class Line:
    """One line of a panel."""

    key: str  # its column
    label: str
    colour: int = 0  # index into the page's palette, `--c<colour>` in style.css
    style: str = ""  # words among `thin`, `thick`, `dashed` and `dots` (few points, each marked)
    table: str = "metrics"  # or `tests`
    error: str = ""  # column of its standard error, if any
    run: int = 0  # index of its run on the page


@dataclass(frozen=True)
class Panel:
    """One diagram."""

    title: str
    lines: tuple[Line, ...]  # the later ones on top
    log: bool = False  # logarithmic, of absolute values
    low: float | None = None  # a linear scale begins here or lower
    percent: bool = False  # shows fractions as percentages


def _panel(title: str, *lines: Line, **options: Any) -> Panel:
    return Panel(title, lines, **options)


def _shifts(name: str, title: str) -> Panel:
    """Largest, 99th percentile and whole step of one shift."""
    return _panel(
        title,
        Line(f"capo/{name}/max", "largest token", 1),
        Line(f"capo/{name}/p99", "99th percentile", 0),
        Line(f"capo/batch_{name}", "whole step", 2),
        log=True,
    )


PANELS = (
    _panel(
        "Reward and held-out accuracy",
        Line("reward", "reward of a step", 2, "thin"),
        Line(MEAN, f"mean of {WINDOW} steps", 0, "thick"),
        Line("accuracy", "held-out accuracy", 1, "dots"),
        low=0,
    ),
    _panel(
        "Tokens rejected, % of all",
        Line("capo/rejected_frac_objective", "by the objective bound", 2),
        Line("capo/rejected_frac_policy", "by the policy bound", 1),
        Line("capo/rejected_frac", "rejected", 0),
        Line("capo/scaled_frac", "scaled down", 3),
        low=0,
        percent=True,
    ),
    _shifts("policy_shift", "Policy shift m_F (nats)"),
    _shifts("objective_shift", "Objective shift |m_H|"),
    _panel(
        "KL of the update (nats)",
        Line("capo/batch_policy_shift", "predicted at the scheduled rate", 2),
        Line("capo/measured_kl_head", "of the last layer alone", 1),
        Line("budget/nats", "budget", 3, "dashed"),
        Line(STEP_KL, "measured", 0),
        log=True,
    ),
    _panel("Measurements of a step, until its KL fits", Line("budget/passes", "forward passes", 0), low=0),
    _panel(
        "Change of the surrogate objective, absolute",
        Line("capo/batch_objective_shift", "predicted at the scheduled rate", 2),
        Line("capo/measured_objective", "measured", 0),
        log=True,
    ),
    _panel("Rank correlation of m_F with the true KL", Line("capo/kl_spearman", "Spearman, over tokens", 0), low=0),
    _panel("Gradient norm before clipping", Line("grad_norm", "gradient norm", 0), log=True),
    _panel("Entropy (nats a token)", Line("entropy", "entropy", 0), low=0),
    _panel("Learning rate", Line("learning_rate", "scheduled", 2), Line(TAKEN, "taken", 0), low=0),
    _panel(
        "Length of completions (tokens)",
        Line("completions/max_length", "longest", 2, "thin"),
        Line("completions/mean_length", "mean", 0),
        low=0,
    ),
    _panel("Seconds a step", *(Line(f"time/{name}", name, colour) for colour, name in enumerate(TIMES)), low=0),
)


def run_panels(metrics: dict[str, list], tests: dict[str, list]) -> list[dict[str, Any]]:
    """The panels that a single run has something for, as plain data; TEST follows the reward."""
    panels = list(PANELS)
    title = f"TEST, mean of {tests.get('over', [0])[-1] or 0} test sets"
    panels.insert(1, Panel(title, (Line("test", "TEST", 1, "dots", "tests", "test_stderr"),)))
    names = [key for key in tests if key.startswith("task ")]
    lines = tuple(Line(key, key.removeprefix("task "), i % 8, "dots", "tests") for i, key in enumerate(names))
    panels.append(Panel("TEST by test set", lines, low=0))
    return _present(panels, [{"metrics": metrics, "tests": tests}])


def compare_panels(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The panels that several runs have data for: one metric each, a line a run."""

    def panel(title: str, key: str, style: str = "", table: str = "metrics", error: str = "", **options: Any) -> Panel:
        lines = (
            Line(key, run["label"], run["colour"], f"{style} {run['style']}".strip(), table, error, i)
            for i, run in enumerate(runs)
        )
        return _panel(title, *lines, **options)

    panels = [
        panel(f"Reward, mean of {WINDOW} steps", MEAN, low=0),
        panel("Held-out accuracy", "accuracy", "dots", low=0),
        panel("TEST", "test", "dots", "tests", "test_stderr"),
        panel("Tokens rejected, % of all", "capo/rejected_frac", low=0, percent=True),
        panel("Tokens scaled down, % of all", "capo/scaled_frac", low=0, percent=True),
        panel("Largest token's policy shift m_F (nats)", "capo/policy_shift/max", log=True),
        panel("Policy shift of the step (nats)", "capo/batch_policy_shift", log=True),
        panel("Objective shift of the step, absolute", "capo/batch_objective_shift", log=True),
        panel("Measured KL of the update (nats)", STEP_KL, log=True),
        panel("Gradient norm before clipping", "grad_norm", log=True),
        panel("Entropy (nats a token)", "entropy", low=0),
        panel("Learning rate taken", TAKEN, low=0),
        panel("Mean length of completions (tokens)", "completions/mean_length", low=0),
        panel("Seconds a step", "time/total", low=0),
    ]
    return _present(panels, runs)


def _present(panels: list[Panel], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the lines that have no points (tokens never scaled count as none), and panels without lines."""

    def drawn(line: Line) -> bool:
        column = runs[line.run][line.table].get(line.key, ())
        return any(v is not None and (v or line.key != "capo/scaled_frac") for v in column)

    present = (replace(panel, lines=tuple(filter(drawn, panel.lines))) for panel in panels)
    return [asdict(panel) for panel in present if panel.lines]


def drawn_columns(panels: list[dict[str, Any]]) -> set[str]:
    """The metric columns that a page with these panels needs."""
    return {line["key"] for panel in panels for line in panel["lines"]} | set(AXES)


def metric_columns(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Turn metric lines into columns of numbers or None, with the running mean of the reward and the rate taken."""
    keys = {key: None for row in rows for key, value in row.items() if number(value) is not None}
    columns = {key: [number(row.get(key)) for row in rows] for key in keys}
    if "reward" in columns:
        columns[MEAN] = _running_mean(columns["reward"])
    if measured := columns.get("budget/kl", columns.get("capo/measured_kl")):
        columns[STEP_KL] = measured
    if "budget/alpha" in columns:  # the rate that filled the step's KL budget
        columns[TAKEN] = columns["budget/alpha"]
        if columns.get("learning_rate") == columns[TAKEN]:  # there is no scheduled one
            del columns["learning_rate"]
    elif "learning_rate" in columns:
        factors = columns.get("capo/step_scale", [1.0] * len(rows))
        columns[TAKEN] = [
            None if rate is None or factor is None else number(rate * factor)
            for rate, factor in zip(columns["learning_rate"], factors, strict=True)
        ]
    return columns


def test_columns(tests: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Turn the lines of eval.jsonl into columns, a number or None a line; a test set is `task <name>`."""
    rows = []
    for test in tests:
        tasks = test.get("tasks") if isinstance(test.get("tasks"), dict) else {}
        accuracies = {f"task {name}": task.get("accuracy") for name, task in tasks.items() if isinstance(task, dict)}
        rows.append({key: test.get(key) for key in TEST_COLUMNS} | accuracies)
    columns = {
        key: [number(row.get(key)) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)
    }
    return {key: column for key, column in columns.items() if any(v is not None for v in column)}


def number(value: Any) -> float | int | None:
    """A finite number in few digits, or None for anything else."""
    value = finite(value)
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _running_mean(values: list[float | None]) -> list[float | None]:
    """The mean of each value and the WINDOW - 1 known ones before it."""
    known: list[float] = []
    means = []
    for value in values:
        known += [] if value is None else [value]
        means.append(None if value is None else number(statistics.fmean(known[-WINDOW:])))
    return means
