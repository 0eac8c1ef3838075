"""report.html of one run, finished or not: curves, the steps to look at, the time, token records, the settings."""

from __future__ import annotations

import html
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from open_r1_capo.report.facts import tiles, time_breakdown, worst_steps
from open_r1_capo.report.page import LIMIT, embed, fit_metrics, notes_html, render, table_html, text
from open_r1_capo.report.panels import AXES, RUN_COLOURS, metric_columns, run_panels, test_columns
from open_r1_capo.report.records import fit, read_records
from open_r1_capo.runs.exit import UserError
from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.runs.run import write_atomically
from open_r1_capo.runs.summary import summarise


class ReportError(UserError, ValueError):
    """A folder that no report can be made of; the message is one sentence for the user."""


def write_report(folder: RunFolder, settings: dict[str, Any], summary: dict[str, Any] | None) -> None:
    """Write report.html, one file that needs no network.

    Args:
        folder: of the run.
        settings: the resolved recipe.
        summary: from `summarise`; None for a run that has not ended.
    """
    rows, tests = folder.metrics(), folder.evaluations()
    metrics = metric_columns(rows)
    status = unfinished(folder, settings, metrics) if summary is None else ""
    status += " The same command goes on with it; make report draws it again." if status else ""
    if summary is None:
        summary = summarise(settings, rows) if metrics else {}
    run = {"label": label(settings), "metrics": metrics, "tests": test_columns(tests)}
    panels = run_panels(metrics, run["tests"], tests[-1].get("over", 0) if tests else 0)
    worst = worst_steps(metrics)
    interesting = [step for rank in range(3) for row in worst for step, _ in row["steps"][rank : rank + 1]]
    drawn = {line["key"] for panel in panels for line in panel["lines"]} | set(AXES)
    run["metrics"], thinned = fit_metrics(metrics, drawn, set(interesting))
    records, notes = read_records(folder.path, interesting)
    sections = {
        "heading": html.escape(label(settings)),
        "status": notes_html([status, thinned]),
        "tiles": tiles_html(summary),
        "worst": worst_html(worst, {record["step"] for record in records}),
        "time": time_html(time_breakdown(metrics)),
        "token_notes": notes_html(notes + tokens_missing(records, settings)),
        "settings": f"<pre>{html.escape(settings_text(folder, settings))}</pre>",
        "settings_title": "Settings",
    }
    data = {"runs": [run], "panels": panels, "axes": AXES, "runColours": RUN_COLOURS}
    data |= {"bounds": bounds(settings), "records": []}
    room = LIMIT - len(render("", sections, data).encode()) - 10_000
    # escaping makes a text longer than its JSON, by as much as five bytes a character: try again with less
    for share in (1.0, 0.8, 0.5, 0.2, 0.0):
        data["records"] = fit(records, int(share * room))
        if len(embed(data["records"])) <= room:
            break
    write_atomically(folder.report_file, render(f"{label(settings)} · open-r1-capo", sections, data))


def label(settings: dict[str, Any]) -> str:
    """What a run is called."""
    return f"{settings['recipe']} · {settings.get('scale', '?')} · seed {settings.get('seed', '?')}"


def read_settings(folder: RunFolder) -> dict[str, Any]:
    """The settings that a run's folder was made with.

    Args:
        folder: of the run.

    Returns:
        The content of config.yaml, with the environment.

    Raises:
        ReportError: it is no run's folder.
    """
    if not folder.path.is_dir():
        raise ReportError(f"{folder.path} is no run's folder: there is no such folder")
    try:
        settings = OmegaConf.to_container(OmegaConf.load(folder.config_file))
    except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict) or "recipe" not in settings:
        raise ReportError(f"{folder.path} is no run's folder (no config.yaml of a run in it)")
    return settings


def unfinished(folder: RunFolder, settings: dict[str, Any], metrics: dict[str, list]) -> str:
    """A sentence about a run that has not ended.

    Args:
        folder: of the run.
        settings: the resolved recipe.
        metrics: columns so far.

    Returns:
        How far it is, and how long ago it wrote its last line.
    """
    if not metrics:
        return "This run has not finished a step yet."
    planned = settings.get("max_steps")
    steps = f"step {metrics['step'][-1]:,}" + (f" of {planned:,}" if isinstance(planned, int) and planned > 0 else "")
    hours = max(0, time.time() - folder.metrics_file.stat().st_mtime) / 3600
    ago = f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"
    return f"This run has not ended: it was at {steps}, written {ago} before this page."


def bounds(settings: dict[str, Any]) -> dict[str, Any]:
    """δ_F and the interval of m_H, null where they bound nothing.

    Args:
        settings: the resolved recipe.

    Returns:
        `policy`, a number or None; `objective`, a pair of numbers or None.
    """
    capo = settings.get("capo") or {}
    if capo.get("mode") not in ("mask", "scale"):
        return {"policy": None, "objective": [None, None]}
    high = _finite(capo.get("max_objective_shift"))
    low = capo.get("min_objective_shift")
    return {
        "policy": _finite(capo.get("max_policy_shift")),
        "objective": [(None if high is None else -high) if low is None else _finite(low), high],
    }


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None


def tokens_missing(records: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Why there is nothing to show of the tokens, if there is nothing."""
    if records:
        return []
    if (settings.get("capo") or {}).get("mode") in ("off", False):  # YAML's off
        return ["No token was looked at: capo.mode is off (observe looks and changes nothing)."]
    return ["The run kept no token records (token_records=notable keeps those of a few steps)."]


def settings_text(folder: RunFolder, settings: dict[str, Any]) -> str:
    """The settings as YAML, with the environment where config.yaml has one."""
    try:
        return folder.config_file.read_text(encoding="utf-8")
    except OSError:
        return OmegaConf.to_yaml(OmegaConf.create(settings))


def tiles_html(summary: dict[str, Any]) -> str:
    """The result in a few figures."""
    return "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(note)}</small></dd></div>"
        for name, value, note in tiles(summary)
    )


def worst_html(worst: list[dict[str, Any]], recorded: set[int]) -> str:
    """The table of the steps to look at, each linking to the curves and to its tokens where they were recorded."""
    if not worst:
        return notes_html(["No step has been logged."])

    def cell(step: int, value: float, percent: bool) -> str:
        shown = f"{value:.2%}" if percent else f"{value:.3g}"
        tokens = f' <a class="to" href="#tokens-{step}">tokens</a>' if step in recorded else ""
        return f'<a href="#step-{step}">step {step}</a> <span class="value">{shown}</span>{tokens}'

    rows = [[text(row["name"]), *(cell(*point, row["percent"]) for point in row["steps"])] for row in worst]
    rows = [row + [""] * (4 - len(row)) for row in rows]
    return table_html(rows, ["", "worst", "second", "third"])


def time_html(rows: list[dict[str, Any]]) -> str:
    """The table of the seconds, after the paper's Table 1."""
    if not rows:
        return notes_html(["No times were logged."])
    cells = [
        [
            f"{text(row['name'])}<small>{text(row['what'])}</small>",
            f"{row['seconds']:.3f}",
            f'<span class="bar" style="--share:{row["share"]:.4f}">{row["share"]:.2%}</span>',
        ]
        for row in rows
    ]
    return table_html(cells, ["", "mean s a step", "% of total"])


def write_reports(names: list[str]) -> list[tuple[RunFolder, dict[str, Any] | None]]:
    """Write the reports of run folders.

    Args:
        names: of the folders.

    Returns:
        Each folder with its summary, None for a run that has not ended.

    Raises:
        ReportError: one of them is no run's folder; nothing has been written.
    """
    runs = [(folder, read_settings(folder)) for folder in (RunFolder(Path(name)) for name in names)]
    written = []
    for folder, settings in runs:
        summary = folder.summary
        write_report(folder, settings, summary)
        written.append((folder, summary))
    return written
