"""Read the runs of an experiment into columns for the figures; seeds of different settings are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from open_r1_capo.experiments import spec as experiments
from open_r1_capo.experiments.spec import Arm, Experiment
from open_r1_capo.runs.exit import UserError
from open_r1_capo.runs.folder import NOT_IDENTITY
from open_r1_capo.runs.run import Run, read_lines

ALWAYS = ("step", "completions", "accepted_tokens", "reward")  # columns that every figure has
TEST = "test"  # the TEST average of eval.jsonl, named like a column of metrics.jsonl
FREE = {"seed", "evaluation", *NOT_IDENTITY}  # settings in which the seeds of one arm may differ
FAMILIES = {"dr": "Dr.GRPO", "rein": "REINFORCE", "": "GRPO"}  # base method by how its recipes' names begin


class FigureError(UserError, ValueError):
    """A figure cannot be drawn."""


@dataclass
class RunData:
    """What one run has written."""

    folder: Path
    columns: dict[str, np.ndarray]  # metric → (T,) float64, one value an optimizer step; NaN where a line has none
    tests: list[dict[str, Any]]  # the lines of eval.jsonl, in the order of their steps
    settings: dict[str, Any]

    @property
    def rewards(self) -> list[float]:
        """The in-training accuracy of the steps that have one (not those on completions of an earlier step)."""
        values = self.columns["reward"]
        return values[~np.isnan(values)].tolist()

    @property
    def finished(self) -> bool:
        """Whether the run has reached its max_steps; the last accuracy of an unfinished run cannot be compared."""
        done = self.columns["step"].max(initial=0)
        return 0 < done >= (self.settings.get("max_steps") or 0)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps (T,) and values (T,) of a loaded column or of TEST, without NaN."""
        if key == TEST:
            steps, values = (np.array([line[name] for line in self.tests], dtype=float) for name in ("step", TEST))
        else:
            steps, values = self.columns["step"], self.columns[key]
        known = ~np.isnan(values)
        return steps[known], values[known]

    def at(self, key: str, step: int) -> float:
        """A column's value at a step; 0 at step 0, before training; NaN where there is none."""
        if step == 0:
            return 0.0
        places = np.flatnonzero(self.columns["step"] == step)
        return float(self.columns[key][places[-1]]) if len(places) else float("nan")


@dataclass
class Line:
    """The finished runs of an arm, in the order of the seeds."""

    arm: Arm
    runs: list[RunData]

    @property
    def family(self) -> str:
        """The base method: a value of FAMILIES."""
        return next(name for start, name in FAMILIES.items() if self.arm.recipe.startswith(start))


@dataclass
class Data:
    """What a figure is drawn from."""

    experiment: Experiment
    lines: list[Line]  # one for each arm; of a grid that was searched, only the arms that were run
    warnings: list[str]  # sentences about runs that are missing, unfinished or cut

    @property
    def runs(self) -> list[RunData]:
        """The runs of all lines."""
        return [run for line in self.lines for run in line.runs]

    @property
    def seeds(self) -> str:
        """How many seeds a line has, for the figure: `n = 5 seeds`, or `n = 3 to 4 of 5 seeds`."""
        counts, all_of = sorted({len(line.runs) for line in self.lines}), len(self.experiment.seeds)
        if counts == [all_of]:
            return f"n = {all_of} seed{'s' if all_of != 1 else ''}"
        return f"n = {' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))} of {all_of} seeds"


def rows_of(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file; a cut last line becomes a warning, any other broken line a FigureError."""
    try:
        lines = read_lines(path)
    except OSError as error:
        raise FigureError(f"{path} cannot be read ({error.strerror})") from None
    if lines.broken and not lines.last:
        raise FigureError(
            f"{path}:{lines.broken} is not a JSON object with a step: repair or delete that run's folder"
        )
    if lines.broken:
        warnings.append(f"the last line of {path} was cut off and is left out")
    return lines.rows


def read_run(run: Run, keys: Iterable[str], warnings: list[str]) -> RunData:
    """Read ALWAYS, `keys` and, if among them, TEST; a FigureError for a broken line or a value that is no number."""
    rows, columns = rows_of(run.metrics_file, warnings), {}
    for key in dict.fromkeys((*ALWAYS, *keys)):
        values = [row.get(key) for row in rows]
        for number, value in enumerate(values, start=1):
            if not isinstance(value, int | float | None):
                raise FigureError(f"{run.metrics_file}:{number} has {value!r} for {key}, which is no number")
        columns[key] = np.array([np.nan if value is None else value for value in values], dtype=float)
    tests = rows_of(run.evaluations_file, warnings) if TEST in keys else []
    tests = [line for line in tests if isinstance(line.get(TEST), int | float)]
    return RunData(run.path, columns, sorted(tests, key=lambda line: line["step"]), run.settings)


def check_settings(runs: list[RunData]) -> None:
    """Refuse seeds of one arm that were run with different settings, with a FigureError."""
    for run in runs[1:]:
        a, b = runs[0].settings, run.settings
        for key in sorted((a.keys() | b.keys()) - FREE, key=str):
            if a.get(key) != b.get(key):
                raise FigureError(
                    f"{runs[0].folder} and {run.folder} are seeds of one arm with different settings ({key}: "
                    f"{a.get(key)!r} / {b.get(key)!r}): run one of them again with OVERWRITE=1"
                )


def load(experiment: Experiment, keys: Iterable[str], partial: bool = False) -> Data:
    """Read ALWAYS and `keys` of an experiment's runs.

    Raises:
        FigureError: runs do not match, or an arm has none; where `partial`, that no arm has any.
    """
    keys, warnings, lines, absent = tuple(keys), [], [], []
    for arm in experiment.arms:
        runs = []
        for seed in experiment.seeds:
            run = Run(experiment.folder(arm, seed))
            data = read_run(run, keys, warnings) if run.metrics_file.is_file() else None
            if data and data.finished:
                runs.append(data)
            else:
                absent.append(run.path)
        check_settings(runs)
        lines.append(Line(arm, runs))
    wanted = len(experiment.arms) * len(experiment.seeds)
    command = f"make experiment NAME={experiment.name} SCALE={experiment.scale} SEEDS={len(experiment.seeds)}"
    gap = f"{len(absent)} of {wanted} runs are missing or unfinished (the first: {absent[0]})" if absent else ""
    labels = {line.arm.label for line in lines if not line.runs}
    if experiment.search or partial:  # bisection leaves most of a grid out
        lines = [line for line in lines if line.runs]
        labels = set() if partial else labels - {line.arm.label for line in lines}
    if absent and not labels and not experiment.search:
        warnings.append(f"{gap}; {command} makes them")
    if labels or not lines:
        without = f"{min(labels)!r} has no finished run; " if labels else ""
        raise FigureError(f"{without}{gap}; {command} makes them")
    return Data(experiment, lines, warnings)


def load_scales(name: str, seeds: int | None, keys: Iterable[str], partial: bool = False) -> list[Data]:
    """Read an experiment at every scale that can be drawn, with a warning for the others; see `load`.

    Raises:
        FigureError: no scale can be drawn.
    """
    scales, warnings, keys = [], [], tuple(keys)
    for experiment in scales_with_runs(name, seeds):
        try:
            scales.append(load(experiment, keys, partial))
        except UserError as error:
            warnings.append(f"without {experiment.scale}: {error}")
    if not scales:
        none = f"it has no runs at any scale; make experiment NAME={name} SCALE=… makes them"
        raise FigureError("; ".join(warnings) or none)
    scales[0].warnings += warnings
    return scales


def scales_with_runs(name: str, seeds: int | None) -> list[Experiment]:
    """The experiment at each scale that has any run of it, with its first `seeds` seeds (None: all)."""
    scales = [experiments.load(name, scale, seeds) for scale in experiments.known_scales()]
    return [one for one in scales if has_runs(one)]


def has_runs(experiment: Experiment) -> bool:
    """Whether an experiment has any run at its scale."""
    return any(Run(experiment.folder(*job)).metrics_file.is_file() for job in experiment.runs())
