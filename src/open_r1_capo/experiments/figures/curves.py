"""Reads the runs of an experiment for the figures: metrics.jsonl, eval.jsonl and, to check them, config.yaml."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from open_r1_capo.experiments import spec as experiments
from open_r1_capo.experiments.spec import Arm, Experiment
from open_r1_capo.runs.folder import NOT_IDENTITY

ALWAYS = ("step", "completions", "accepted_tokens", "reward")  # columns that every figure has
TEST = "test"  # the TEST average of eval.jsonl, named like a column of metrics.jsonl
FREE = {"seed", "environment", "evaluation", *NOT_IDENTITY}  # in which the seeds of one arm may differ


class FigureError(ValueError):
    """A figure cannot be drawn; the message is one sentence for the user."""


@dataclass
class Run:
    """What one run has written.

    Attributes:
        folder: its folder.
        columns: metric → (T,) float64, one value an optimizer step; NaN where a line has none.
        tests: the lines of eval.jsonl, in the order of their steps.
    """

    folder: Path
    columns: dict[str, np.ndarray]
    tests: list[dict]

    @property
    def rewards(self) -> list[float]:
        """The in-training accuracy of the steps that have one (not those on completions of an earlier step)."""
        values = self.columns["reward"]
        return values[~np.isnan(values)].tolist()

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Take a metric by its steps.

        Args:
            key: a loaded column, or TEST.

        Returns:
            steps (T,) and values (T,), without NaN.
        """
        if key == TEST:
            steps, values = (np.array([line[name] for line in self.tests], dtype=float) for name in ("step", TEST))
        else:
            steps, values = self.columns["step"], self.columns[key]
        known = ~np.isnan(values)
        return steps[known], values[known]

    def at(self, key: str, step: int) -> float:
        """Look a column up at a step; 0 at step 0, before training; NaN where there is none."""
        if step == 0:
            return 0.0
        found = np.flatnonzero(self.columns["step"] == step)
        return float(self.columns[key][found[-1]]) if len(found) else float("nan")


@dataclass
class Line:
    """The runs of an arm that are there.

    Attributes:
        arm: of the experiment.
        runs: its finished runs, in the order of the seeds.
    """

    arm: Arm
    runs: list[Run]

    def setting(self, key: str) -> float | None:
        """The number that the arm's overrides give a setting, or None."""
        try:
            return self.arm.value(key)
        except KeyError:
            return None


@dataclass
class Data:
    """What a figure is drawn from.

    Attributes:
        name: the figure's.
        experiment: whose runs it shows.
        lines: one for each arm; of a grid that was searched, only the arms that were run.
        warnings: sentences about runs that are missing, unfinished or cut.
    """

    name: str
    experiment: Experiment
    lines: list[Line]
    warnings: list[str]

    @property
    def seeds(self) -> str:
        """How many seeds stand behind a line, for the figure: `n = 5 seeds`, or `n = 3 to 4 of 5 seeds`."""
        counts, all_of = sorted({len(line.runs) for line in self.lines}), len(self.experiment.seeds)
        if counts == [all_of]:
            return f"n = {all_of} seed{'s' if all_of != 1 else ''}"
        return f"n = {' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))} of {all_of} seeds"


def read_lines(path: Path, warnings: list[str]) -> list[dict]:
    """Read a file of JSON lines whose last line may have been cut off.

    Args:
        path: the file.
        warnings: gets a sentence if a cut last line was left out.

    Returns:
        Its objects.

    Raises:
        FigureError: the file cannot be read, or an earlier line is broken.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FigureError(f"{path} cannot be read ({error})") from None
    rows = [parse(line) for line in lines]
    if rows and rows[-1] is None:
        warnings.append(f"the last line of {path} was cut off and is left out")
        rows.pop()
    if None in rows:
        number = rows.index(None) + 1
        raise FigureError(f"{path}:{number} is not a JSON object with a step: repair or delete that run's folder")
    return rows


def parse(line: str) -> dict | None:
    """Read one line; None if it is not a JSON object with a step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_run(folder: Path, keys: Iterable[str], warnings: list[str]) -> Run:
    """Read a run's metrics and TEST.

    Args:
        folder: of the run.
        keys: metrics beside ALWAYS; TEST reads eval.jsonl.
        warnings: gets sentences about lines that were cut off.

    Returns:
        The run, with these columns alone.

    Raises:
        FigureError: a broken line, or a value that is no number.
    """
    path, tests = folder / "metrics.jsonl", folder / "eval.jsonl"
    rows = read_lines(path, warnings)
    columns = {}
    for key in dict.fromkeys((*ALWAYS, *keys)):
        values = [row.get(key) for row in rows]
        for number, value in enumerate(values, start=1):
            if not isinstance(value, int | float | None):
                raise FigureError(f"{path}:{number} has {value!r} for {key}, which is no number")
        columns[key] = np.array([np.nan if value is None else value for value in values], dtype=float)
    lines = read_lines(tests, warnings) if TEST in keys and tests.is_file() else []
    lines = [line for line in lines if isinstance(line.get(TEST), int | float)]
    return Run(folder, columns, sorted(lines, key=lambda line: line["step"]))


def unfinished(folder: Path, run: Run) -> bool:
    """Whether a run has stopped before config.yaml's max_steps: its last accuracy is not the others' last."""
    steps = re.search(r"^max_steps: (\d+)", config_text(folder) or "", re.MULTILINE)
    done = run.columns["step"].max(initial=0)
    return done == 0 or (steps is not None and done < int(steps.group(1)))


def config_text(folder: Path) -> str | None:
    """What a run's config.yaml holds, None if there is none; FigureError if it cannot be read."""
    path = folder / "config.yaml"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise FigureError(f"{path} cannot be read ({error}): run it again with OVERWRITE=1") from None


def settings(folder: Path) -> dict:
    """The settings in a run's config.yaml; FigureError if there are none."""
    try:
        found = yaml.load(config_text(folder) or "", getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise FigureError(f"{folder / 'config.yaml'} holds no settings of a run: run it again with OVERWRITE=1")
    return found


def check_settings(folders: list[Path]) -> None:
    """Refuse seeds of one arm that were run with different settings.

    Args:
        folders: of the arm's runs.

    Raises:
        FigureError: a difference, named by its first key, or a config.yaml that cannot be read.
    """
    first = None
    for folder in folders:
        text = config_text(folder)
        if text is None:
            continue
        # almost always equal but for the seed and the environment: compared as text, parsed only if that differs
        plain = re.sub(r"^(seed|output_root):.*\n", "", text.partition("\nenvironment:")[0], flags=re.MULTILINE)
        if first is None:
            first = (folder, plain)
        elif plain != first[1] and (differing := difference(first[0], folder)):
            raise FigureError(
                f"{first[0]} and {folder} are seeds of one arm with different settings ({differing}): "
                "run one of them again with OVERWRITE=1"
            )


def difference(one: Path, other: Path) -> str | None:
    """Name the first setting in which two runs differ.

    Args:
        one: its folder.
        other: the second one's.

    Returns:
        `key: value / value`, or None.

    Raises:
        FigureError: a config.yaml without settings.
    """
    a, b = settings(one), settings(other)
    for key in sorted((a.keys() | b.keys()) - FREE, key=str):
        if a.get(key) != b.get(key):
            return f"{key}: {a.get(key)!r} / {b.get(key)!r}"
    return None


def load(name: str, experiment: Experiment, keys: Iterable[str]) -> Data:
    """Read what a figure needs of an experiment's runs.

    Args:
        name: the figure's.
        experiment: the runs' experiment.
        keys: metrics beside ALWAYS; TEST reads eval.jsonl.

    Returns:
        The data, with a warning for what is missing but can be done without.

    Raises:
        FigureError: an arm without a finished run, a broken file, or seeds of different settings.
    """
    keys, warnings, lines, absent = tuple(keys), [], [], []
    for arm in experiment.arms:
        runs = []
        for seed in experiment.seeds:
            folder = experiment.folder(arm, seed)
            if (folder / "metrics.jsonl").is_file() and not unfinished(
                folder, run := read_run(folder, keys, warnings)
            ):
                runs.append(run)
            else:
                absent.append(folder)
        check_settings([run.folder for run in runs])
        lines.append(Line(arm, runs))
    wanted = len(experiment.arms) * len(experiment.seeds)
    command = f"make experiment NAME={experiment.name} SCALE={experiment.scale} SEEDS={len(experiment.seeds)}"
    gap = f"{len(absent)} of {wanted} runs are missing or unfinished (the first: {absent[0]})" if absent else ""
    if experiment.search:  # bisection leaves most of a grid out
        labels = {line.arm.label for line in lines if not line.runs} - {line.arm.label for line in lines if line.runs}
        lines = [line for line in lines if line.runs]
    else:
        labels = {line.arm.label for line in lines if not line.runs}
        warnings += [f"{gap}; {command} makes them"] if absent and not labels else []
    if labels or not lines:
        without = f"{min(labels)!r} has no finished run; " if labels else ""
        raise FigureError(f"{without}{gap}; {command} makes them")
    return Data(name, experiment, lines, warnings)


def load_scales(name: str, seeds: int | None, keys: Iterable[str]) -> list[Data]:
    """Read an experiment at every scale that has runs; a scale that cannot be drawn is left out with a warning.

    Args:
        name: the figure's and the experiment's.
        seeds: only the first so many; None takes all.
        keys: as `load`.

    Returns:
        One or more.

    Raises:
        FigureError: no scale can be drawn.
    """
    found, warnings, keys = [], [], tuple(keys)
    for experiment in scales_with_runs(name, seeds):
        try:
            found.append(load(name, experiment, keys))
        except FigureError as error:
            warnings.append(f"without {experiment.scale}: {error}")
    if not found:
        none = f"it has no runs at any scale; make experiment NAME={name} SCALE=… makes them"
        raise FigureError("; ".join(warnings) or none)
    found[0].warnings += warnings
    return found


def scales_with_runs(name: str, seeds: int | None) -> list[Experiment]:
    """List the scales at which an experiment has any run.

    Args:
        name: the experiment's.
        seeds: only the first so many; None takes all.

    Returns:
        The experiment at each of these scales, by name.
    """
    found = [experiments.load(name, scale, seeds) for scale in experiments.known_scales()]
    return [one for one in found if has_runs(one)]


def has_runs(experiment: Experiment) -> bool:
    """Whether an experiment has any run at its scale."""
    return any((experiment.folder(*job) / "metrics.jsonl").is_file() for job in experiment.runs())


def warn(name: str, warnings: Iterable[str]) -> None:
    """Print each warning once, on stderr, with the figure's name."""
    for sentence in dict.fromkeys(warnings):
        print(f"warning: {name}: {sentence}", file=sys.stderr)
