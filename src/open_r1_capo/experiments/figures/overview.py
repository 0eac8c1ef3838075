"""Draws any runs against each other, as the paper's Figures 2, 3 and 5 do, and tables their summaries.

Runs of the same recipe and scale are seeds of one line: its mean, with the standard error shaded.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_r1_capo.experiments.figures.curves import Data, FigureError, Line, Run, read_run, warn
from open_r1_capo.experiments.figures.drawing import Panel, Result, draw, save
from open_r1_capo.experiments.spec import Arm, Experiment
from open_r1_capo.runs.folder import RunFolder

NAME = "runs"
PANELS = (
    Panel("reward", "training reward"),
    Panel("accuracy", "held-out accuracy", smooth=False),
    Panel("capo/rejected_frac", "tokens rejected (Fig. 5)", scale="percent"),
    Panel("capo/policy_shift/max", "largest token policy shift m_F (Fig. 3)", scale="log", smooth=False),
    Panel("capo/batch_policy_shift", "policy shift of the step m_F (Fig. 3)", scale="log", smooth=False),
    Panel("capo/measured_kl", "measured KL of the step (Fig. 9)", scale="log", smooth=False),
)
# a column of the table: its head, where the summary has it, how it is written
COLUMNS = (
    ("accuracy before", ("accuracy_before", "accuracy"), "{:.3f}"),
    ("best", ("accuracy_best",), "{:.3f}"),
    ("last", ("accuracy_after", "accuracy"), "{:.3f}"),
    ("rejected mean", ("rejected_frac", "mean"), "{:.2%}"),
    ("rejected max", ("rejected_frac", "max"), "{:.2%}"),
    ("largest measured KL", ("measured_kl", "max"), "{:.1e}"),
)


def has_steps(folder: Path) -> bool:
    """Whether a folder is that of a run with a line of metrics."""
    return bool(RunFolder(folder).metrics())


def gather(folders: Sequence[Path], warnings: list[str]) -> Data:
    """Read the runs, a line for each recipe and scale.

    Args:
        folders: outputs/<recipe>/<scale>/seed<seed>.
        warnings: gets sentences about lines that were cut off.

    Returns:
        The runs, as those of an experiment.

    Raises:
        FigureError: a folder holds no metrics, or a broken line.
    """
    found: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise FigureError(f"{folder} is not a run folder (no metrics.jsonl)")
        run = read_run(folder, [panel.key for panel in PANELS], warnings)
        if not len(run.columns["step"]):
            raise FigureError(f"{folder} is not a run folder with a step (its metrics.jsonl is empty)")
        scale = folder.absolute().parent
        found[scale.parent.name, scale.name].append(run)
    lines = [Line(Arm(f"{recipe} ({scale})", recipe), runs) for (recipe, scale), runs in found.items()]
    scales = ", ".join(dict.fromkeys(scale for _, scale in found))
    seeds = tuple(range(max(len(line.runs) for line in lines)))
    return Data(NAME, Experiment(NAME, "runs", scales, tuple(line.arm for line in lines), seeds), lines, warnings)


def table(summaries: dict[str, list[dict[str, Any]]]) -> str:
    """Write the runs' summaries as a Markdown table.

    Args:
        summaries: name → the summary of each seed that has ended.

    Returns:
        The table; means over seeds.
    """
    lines = [["run", "seeds", *(head for head, *_ in COLUMNS)], ["---"] * (len(COLUMNS) + 2)]
    for name, seeds in summaries.items():
        if seeds:
            lines.append([name, str(len(seeds)), *(mean(seeds, path, form) for _, path, form in COLUMNS)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean(summaries: Sequence[dict[str, Any]], path: Sequence[str], form: str) -> str:
    """The mean of a number that summaries have, or a dash if none has it."""
    values: list[Any] = list(summaries)
    for key in path:
        values = [value.get(key) if isinstance(value, dict) else None for value in values]
    known = [value for value in values if isinstance(value, int | float)]
    return form.format(statistics.fmean(known)) if known else "–"


def against_each_other(folders: Sequence[Path], smooth: float, out: Path) -> list[Path]:
    """Draw and table runs.

    Args:
        folders: of the runs.
        smooth: weight of the moving average.
        out: folder of runs.png, runs.svg, runs.md and runs.json, which has their summaries too.

    Returns:
        The files written.

    Raises:
        FigureError: a folder is not a run's.
    """
    data = gather(folders, [])
    runs = [run for line in data.lines for run in line.runs]
    panels = [panel for panel in PANELS if any(len(run.series(panel.key)[0]) for run in runs)] or PANELS[:1]
    drawn = draw(data, panels, min(3, len(panels)), smooth)
    ended = {line.arm.label: [RunFolder(run.folder).summary for run in line.runs] for line in data.lines}
    summaries = {label: [summary for summary in seeds if summary] for label, seeds in ended.items()}
    warn(NAME, data.warnings)
    print(table(summaries), end="")
    return save(Result(drawn.numbers | {"summaries": summaries}, drawn.figure, table(summaries)), NAME, out)
