"""One page for several runs: each panel with a line a run, the summaries, and the settings in which they differ.

python -m open_r1_capo.report.compare --out compare.html <run folder> <run folder> …
"""

from __future__ import annotations

import argparse
import html
import sys
from pathlib import Path
from typing import Any

from open_r1_capo.report.page import METRICS_LIMIT, fit_metrics, notes_html, render, table_html, text
from open_r1_capo.report.panels import AXES, RUN_COLOURS, compare_panels, metric_columns, test_columns
from open_r1_capo.report.run import ReportError, label, read_settings, unfinished
from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.runs.run import write_atomically
from open_r1_capo.runs.summary import finite, summarise

NOT_COMPARED = ("output_root", "environment.processor", "environment.python")  # where, not what


def write_comparison(names: list[str], out: Path) -> None:
    """Write the page.

    Args:
        names: run folders, at least two.
        out: the HTML file.

    Raises:
        ReportError: fewer than two folders, one that is no run's, or one that is named twice.
    """
    if len(names) < 2:
        raise ReportError('name two run folders or more: make compare RUNS="<run folder> <run folder>"')
    folders = [RunFolder(Path(name)) for name in names]
    settings = [read_settings(folder) for folder in folders]
    seen: dict[Path, str] = {}
    for name, folder in zip(names, folders, strict=True):
        path = folder.path.resolve()
        if path in seen:
            raise ReportError(f"{name} is named twice (as {seen[path]}): a run is compared with others")
        seen[path] = name
    labels = distinct_labels(folders, settings)
    runs, summaries, notes = [], [], []
    for folder, each, name in zip(folders, settings, labels, strict=True):
        run, summary, note = _read(folder, each, name)
        runs.append(run)
        summaries.append(summary)
        notes.append(f"{name}: {note}" if note else "")
    panels = compare_panels(runs)
    drawn = {line["key"] for panel in panels for line in panel["lines"]} | set(AXES)
    for run in runs:
        run["metrics"], note = fit_metrics(run["metrics"], drawn, set(), 2 * METRICS_LIMIT // len(runs))
        notes.append(f"{run['label']}: {note}" if note else "")
    sections = {
        "heading": f"{len(runs)} runs",
        "status": notes_html(notes),
        "worst": summary_table(labels, summaries),
        "settings": settings_table(labels, settings),
        "settings_title": "Settings that differ",
    }
    data = {"runs": runs, "panels": panels, "axes": AXES, "bounds": {}, "records": [], "runColours": RUN_COLOURS}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(f"{len(runs)} runs · open-r1-capo", sections, data))


def _read(folder: RunFolder, settings: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """One run's tables, its summary so far, and a sentence if it has not ended."""
    rows = folder.metrics()
    metrics, summary, note = metric_columns(rows), folder.summary, ""
    if summary is None:
        note = unfinished(folder, settings, metrics)
        summary = summarise(settings, rows) if metrics else {}
    tests = folder.evaluations()
    return {"label": name, "metrics": metrics, "tests": test_columns(tests)}, summary | _best_test(tests), note


def _best_test(tests: list[dict[str, Any]]) -> dict[str, Any]:
    known = [value for test in tests if (value := finite(test.get("test"))) is not None]
    return {"test_last": known[-1], "test_best": max(known)} if known else {}


def distinct_labels(folders: list[RunFolder], settings: list[dict[str, Any]]) -> list[str]:
    """Short names that tell the runs apart.

    Args:
        folders: of the runs.
        settings: their resolved recipes.

    Returns:
        The folder's first part with the recipe (it names overrides, too) where runs are laid out so, and scale and
        seed where they differ; the whole path where that is not enough.
    """
    parts = []
    for folder, each in zip(folders, settings, strict=True):
        path = folder.path.resolve().parts
        laid_out = len(path) > 3 and path[-3].split(",")[0] == each["recipe"]
        name, scale, seed = (path[-3] if laid_out else each["recipe"]), *label(each).split(" · ")[1:]
        parts.append((name, scale, seed))
    varying = [0, *(i for i in (1, 2) if len({part[i] for part in parts}) > 1)]
    labels = [" · ".join(part[i] for i in varying) for part in parts]
    return labels if len(set(labels)) == len(labels) else [str(folder.path) for folder in folders]


def summary_table(labels: list[str], summaries: list[dict[str, Any]]) -> str:
    """The table of what the runs ended with.

    Args:
        labels: of the runs.
        summaries: theirs, {} for a run without a step.

    Returns:
        HTML.
    """

    def cells(s: dict[str, Any]) -> list[str]:
        before, after = s.get("accuracy_before") or {}, s.get("accuracy_after") or {}
        rejected, kl, scale = s.get("rejected_frac"), s.get("measured_kl"), s.get("step_scale")
        windows = s.get("reward_windows") or [None]
        return [
            text(s.get("steps")),
            text(s.get("completions")),
            f"{text(windows[0])} → {text(windows[-1])}",
            f"{text(before.get('accuracy'))} → {text(after.get('accuracy'))}",
            text(s.get("accuracy_best")),
            f"{text(s.get('test_last'))} / {text(s.get('test_best'))}",
            f"{rejected['mean']:.2%} / {rejected['max']:.2%}" if rejected else "–",
            f"{kl['mean']:.1e} / {kl['max']:.1e}" if kl else "–",
            text(scale["mean"]) if scale else "–",
            text(s.get("training_seconds") or None),
        ]

    head = [
        "run", "steps", "completions", "reward, first → last", "held-out, before → after", "best", "TEST, last / best",
        "rejected, mean / max", "measured KL, mean / max", "rate taken", "seconds",
    ]  # fmt: skip
    swatch = '<span class="swatch" style="--colour: var(--c{})"></span>'
    rows = [
        [swatch.format(RUN_COLOURS[i % 8]) + text(name), *cells(summary)]
        for i, (name, summary) in enumerate(zip(labels, summaries, strict=True))
    ]
    return table_html(rows, head)


def settings_table(labels: list[str], settings: list[dict[str, Any]]) -> str:
    """The table of the settings that are not the same in all runs.

    Args:
        labels: of the runs.
        settings: their resolved recipes.

    Returns:
        HTML.
    """
    flat = [_flatten(each) for each in settings]
    keys = dict.fromkeys(key for each in flat for key in each if key not in NOT_COMPARED)
    missing = "–"
    rows = [
        [text(key), *(html.escape(str(each.get(key, missing))) for each in flat)]
        for key in keys
        if len({str(each.get(key, missing)) for each in flat}) > 1
    ]
    return table_html(rows, ["setting", *labels]) if rows else notes_html(["All settings are the same."])


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def main(argv: list[str] | None = None) -> int:
    """Write the page.

    Args:
        argv: `--out FILE` and run folders; None takes the process's arguments.

    Returns:
        0, or 2 if the runs cannot be compared (one sentence says why).
    """
    parser = argparse.ArgumentParser(prog="make compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("compare.html"))
    parser.add_argument("runs", nargs="*")
    options = parser.parse_args(argv)
    try:
        write_comparison(options.runs, options.out)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
