"""report.html of one run, finished or not: curves, the steps to look at, the time, token records, the settings."""

from __future__ import annotations

import html
import time
from typing import Any

from open_r1_capo.report.facts import WORST, tiles, time_breakdown, worst_steps
from open_r1_capo.report.page import LIMIT, embed, fit_metrics, notes_html, render, table_html, text
from open_r1_capo.report.panels import AXES, drawn_columns, metric_columns, run_panels, test_columns
from open_r1_capo.report.records import fit, read_records
from open_r1_capo.runs.run import Run, read_lines, write_atomically
from open_r1_capo.runs.summary import finite, summarise


def write_report(run: Run, summary: dict[str, Any] | None = None) -> None:
    """Write report.html, one file that needs no network; `summary` if summary.json is not written yet."""
    ended = summary or run.summary
    curves, summary, notes = read_curves(run, run.label, ended)
    metrics, settings = curves["metrics"], run.settings
    if ended is None:
        notes.append("Run the same command to resume it; make report draws it again.")
    panels = run_panels(metrics, curves["tests"])
    worst = worst_steps(metrics)
    interesting = [step for rank in range(WORST) for row in worst for step, _ in row["steps"][rank : rank + 1]]
    curves["metrics"], thinned = fit_metrics(metrics, drawn_columns(panels), set(interesting))
    records, unreadable = read_records(run, interesting)
    sections = {
        "heading": html.escape(run.label),
        "status": notes_html([" ".join(notes), thinned]),
        "tiles": tiles_html(summary),
        "worst": worst_html(worst, {record["step"] for record in records}),
        "time": time_html(time_breakdown(metrics)),
        "token_notes": notes_html(unreadable + ([] if records else [why_no_records(settings)])),
        "settings": f"<pre>{html.escape(run.config_file.read_text(encoding='utf-8'))}</pre>",
        "settings_title": "Settings",
    }
    data = {"runs": [curves], "panels": panels, "axes": AXES, "bounds": bounds(settings), "records": []}
    room = LIMIT - len(render("", sections, data).encode()) - 10_000
    # escaping makes a text longer than its JSON, by as much as five bytes a character: try again with less
    for share in (1.0, 0.8, 0.5, 0.2, 0.0):
        data["records"] = fit(records, int(share * room))
        if len(embed(data["records"])) <= room:
            break
    write_atomically(run.report_file, render(f"{run.label} · open-r1-capo", sections, data))


def read_curves(
    run: Run, label: str, summary: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Read what a page shows of a run; `summary` is None if the run has not ended.

    Returns:
        The run for the page's script, its summary so far (empty before the first step), and notes on how far an
        unfinished run is and where its metrics are broken.
    """
    lines, notes = read_lines(run.metrics_file), []
    if summary is None:
        summary = summarise(run.settings, lines.rows) if lines.rows else {}
        notes.append(_progress(run, lines.rows))
    if lines.broken and not lines.last:
        notes.append(f"Line {lines.broken} of metrics.jsonl is broken; what follows it is not shown.")
    columns = {"metrics": metric_columns(lines.rows), "tests": test_columns(run.evaluations())}
    return {"label": label, "colour": 0, "style": "", **columns}, summary, notes


def _progress(run: Run, rows: list[dict[str, Any]]) -> str:
    """How far an unfinished run is, and how long ago it wrote its last line."""
    if not rows:
        return "This run has not finished a step yet."
    step = f"step {rows[-1]['step']:,}" + (f" of {run.max_steps:,}" if run.max_steps else "")
    hours = max(0, time.time() - run.metrics_file.stat().st_mtime) / 3600
    ago = f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"
    return f"This run has not ended: it was at {step}, written {ago} before this page."


def bounds(settings: dict[str, Any]) -> dict[str, Any]:
    """δ_F as `policy` and the interval of m_H as `objective`, None where nothing bounds them (Eq. 11)."""
    capo = settings.get("capo") or {}
    policy, high, low = (
        finite(capo.get(f"{name}_shift")) for name in ("max_policy", "max_objective", "min_objective")
    )
    if capo.get("min_objective_shift") is None:
        low = None if high is None else -high
    return {"policy": policy, "objective": [low, high]}


def why_no_records(settings: dict[str, Any]) -> str:
    """Why there are no tokens to show."""
    if (settings.get("capo") or {}).get("mode") == "off":
        return "No token was looked at: capo.mode is off (observe looks and changes nothing)."
    return "The run kept no token records (token_records=notable keeps those of a few steps)."


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
    return table_html([row + [""] * (WORST + 1 - len(row)) for row in rows], ["", "worst", "second", "third"])


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
