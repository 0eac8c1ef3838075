"""One page for several runs: each panel with a line a run, the results, and the settings in which they differ.

Runs that differ in the seed alone are a group: thin lines of one colour, and their mean as a thick one.

python -m open_r1_capo.report.compare --out compare.html <run folder> <run folder> …
"""

from __future__ import annotations

import argparse
import html
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from open_r1_capo.report.page import METRICS_LIMIT, file_errors, fit_metrics, notes_html, render, table_html, text
from open_r1_capo.report.panels import AXES, RUN_COLOURS, compare_panels, drawn_columns, number
from open_r1_capo.report.run import read_curves
from open_r1_capo.runs.exit import UserError, run_cli
from open_r1_capo.runs.run import NOT_IDENTITY, Run, write_atomically
from open_r1_capo.runs.summary import finite

NOT_COMPARED = ("output_root", "environment.processor", "environment.python")  # where it ran, not what
# columns of the results: head, number format, what separates two numbers, and their paths in a summary
RESULTS = (
    ("steps", ",.0f", "", ["steps"]),
    ("completions", ",.0f", "", ["completions"]),
    ("reward, first → last", ".4g", " → ", ["reward_windows", 0], ["reward_windows", -1]),
    ("held-out, before → after", ".4g", " → ", ["accuracy_before", "accuracy"], ["accuracy_after", "accuracy"]),
    ("best", ".4g", "", ["accuracy_best"]),
    ("TEST, last / best", ".4g", " / ", ["test_last"], ["test_best"]),
    ("rejected, mean / max", ".2%", " / ", ["rejected_frac", "mean"], ["rejected_frac", "max"]),
    ("measured KL, mean / max", ".1e", " / ", ["measured_kl", "mean"], ["measured_kl", "max"]),
    ("rate taken", ".4g", "", ["step_scale", "mean"]),
    ("seconds", ".4g", "", ["training_seconds"]),
)


@file_errors()
def write_comparison(names: list[str], out: Path) -> None:
    """Write the page of two runs or more; a UserError if a folder is named twice or holds no run."""
    if len(names) < 2:
        raise UserError('name two run folders or more: make compare RUNS="<run folder> <run folder>"')
    runs: dict[Path, Run] = {}
    for run in map(Run, names):
        known = runs.setdefault(run.path.resolve(), run)
        if known is not run:
            raise UserError(f"{run.path} is named twice (as {known.path}): a run is compared with others")
    groups = group_seeds(list(runs.values()))
    group_labels, labels = label_runs(groups)
    curves, results, notes = [], [], []
    for i, (group, label) in enumerate(zip(groups, group_labels, strict=True)):
        look = {"colour": RUN_COLOURS[i % 8], "style": "dashed" if i >= 8 else ""}
        swatch = f'<span class="swatch" style="--colour: var(--c{look["colour"]})"></span>'
        seeds, summaries = [], []
        for run in group:
            seed, summary, said = read_curves(run, labels[run], run.summary)
            seeds.append(seed | look)
            summaries.append(summary | last_and_best(seed["tests"].get("test", [])))
            results.append([swatch + text(labels[run]), *result_cells(summaries[-1:])])
            notes += [f"{labels[run]}: {note}" for note in said]
        curves += seeds
        begun = [seed for seed in seeds if seed["metrics"]]
        if len(begun) > 1:
            for seed in seeds:
                seed["style"] = f"thin {look['style']}"
            mean = {table: mean_table([seed[table] for seed in begun]) for table in ("metrics", "tests")}
            name = f"{label}, mean of {len(begun)} seeds"
            curves.append(mean | {"label": name, "colour": look["colour"], "style": f"thick {look['style']}"})
            results.append([swatch + text(name), *result_cells(summaries)])
    panels = compare_panels(curves)
    for each in curves:
        limit = 2 * METRICS_LIMIT // len(curves)
        each["metrics"], note = fit_metrics(each["metrics"], drawn_columns(panels), set(), limit)
        notes.append(f"{each['label']}: {note}" if note else "")
    sections = {
        "heading": f"{len(runs)} runs",
        "status": notes_html(notes),
        "worst": table_html(results, ["run", *(head for head, *_ in RESULTS)]),
        "settings": settings_table(groups, group_labels),
        "settings_title": "Settings that differ",
    }
    data = {"runs": curves, "panels": panels, "axes": AXES, "bounds": {}, "records": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(f"{len(runs)} runs · open-r1-capo", sections, data))
    print(out)


def group_seeds(runs: list[Run]) -> list[list[Run]]:
    """Group the runs whose settings differ only in the seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        identity = {key: value for key, value in run.settings.items() if key not in ("seed", *NOT_IDENTITY)}
        groups.setdefault(json.dumps(identity, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def label_runs(groups: list[list[Run]]) -> tuple[list[str], dict[Run, str]]:
    """Short names that tell groups and runs apart: a name for each group and one for each run.

    The name is the recipe, or the folder of outputs/ where it begins with the recipe (it lists overrides, too), with
    scale and seed where they differ; paths where that is not enough.
    """
    runs = [run for group in groups for run in group]
    settings = {run: run.settings for run in runs}
    differing = [key for key in ("scale", "seed") if len({each.get(key) for each in settings.values()}) > 1]
    names, labels = {}, {}
    for run, each in settings.items():
        folder = run.path.resolve().parent.parent.name
        names[run] = folder if folder.split(",")[0] == each["recipe"] else each["recipe"]
        names[run] += f" · {each.get('scale', '?')}" if "scale" in differing else ""
        labels[run] = names[run] + (f" · seed {each.get('seed', '?')}" if "seed" in differing else "")
    group_labels = [names[group[0]] for group in groups]
    if len(set(group_labels)) == len(groups) and len(set(labels.values())) == len(runs):
        return group_labels, labels
    root = _common(runs)
    return [os.path.relpath(_common(group), root) for group in groups], {
        run: os.path.relpath(_common([run]), root) for run in runs
    }


def _common(runs: list[Run]) -> str:
    return os.path.commonpath([run.path.resolve() for run in runs])


def last_and_best(tests: list[float | None]) -> dict[str, float]:
    """TEST at the last evaluated step and at its best, under the names that RESULTS uses."""
    known = [value for value in tests if value is not None]
    return {"test_last": known[-1], "test_best": max(known)} if known else {}


def mean_table(tables: list[dict[str, list]]) -> dict[str, list[float | None]]:
    """The mean of each column that all tables have, at the steps that all have; None where a value is missing."""
    rows = [{step: row for row, step in enumerate(table.get("step", ()))} for table in tables]
    steps = [step for step in rows[0] if all(step in each for each in rows)]

    def mean(key: str, step: int) -> float | None:
        values = [table[key][each[step]] for table, each in zip(tables, rows, strict=True)]
        return None if None in values else number(statistics.fmean(values))

    # the standard error of a mean is not the mean of the standard errors
    keys = [key for key in tables[0] if key != "test_stderr" and all(key in table for table in tables)]
    return {key: [mean(key, step) for step in steps] for key in keys} if steps else {}


def result_cells(summaries: list[dict[str, Any]]) -> list[str]:
    """A row of the results: of one run, or the means over several."""
    cells = []
    for _, form, between, *paths in RESULTS:
        numbers = []
        for path in paths:
            known = [value for summary in summaries if (value := _value(summary, path)) is not None]
            numbers.append(format(statistics.fmean(known), form) if known else "–")
        cells.append("–" if set(numbers) == {"–"} else between.join(numbers))
    return cells


def _value(summary: Any, path: list[str | int]) -> float | None:
    for key in path:
        try:
            summary = summary[key]
        except (KeyError, IndexError, TypeError):
            return None
    return finite(summary)


def settings_table(groups: list[list[Run]], labels: list[str]) -> str:
    """The table of settings, commit and versions that differ between runs, with a column for each group."""
    flat = [[_flatten(run.settings | {"environment": run.environment}) for run in group] for group in groups]
    rows = []
    for key in dict.fromkeys(key for group in flat for each in group for key in each if key not in NOT_COMPARED):
        cells = [dict.fromkeys(str(each.get(key, "–")) for each in group) for group in flat]
        if len({value for cell in cells for value in cell}) > 1:
            rows.append([text(key), *(html.escape(", ".join(cell)) for cell in cells)])
    return table_html(rows, ["setting", *labels]) if rows else notes_html(["All settings are the same."])


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def main(argv: list[str] | None = None) -> int:
    """Write the page of the run folders named."""
    parser = argparse.ArgumentParser(prog="make compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("compare.html"))
    parser.add_argument("runs", nargs="*")
    options = parser.parse_args(argv)

    return run_cli(lambda: write_comparison(options.runs, options.out))


if __name__ == "__main__":
    sys.exit(main())
