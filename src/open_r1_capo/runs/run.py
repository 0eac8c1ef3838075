"""Read a run from its folder, finished or not: the only reader of what a run leaves behind.

`Run(folder).settings`, `.metrics()`, `.evaluations()`, `.summary`, `.checkpoints()`. `RunFolder` writes them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from open_r1_capo.runs.checkpoints import checkpoint_folders, find_damage
from open_r1_capo.runs.exit import UserError

# what every summary.json has; further keys depend on the run
SUMMARY = ("recipe", "scale", "seed", "steps", "completions", "reward_windows", "accuracy_before", "accuracy_after")
# where a run is written, how it is watched, or where its server is, does not make it another run; nor does the name of
# a group of settings that are compared themselves
NOT_IDENTITY = (
    "overwrite", "output_root", "report_to", "run_name", "num_threads", "token_records",
    "method", "rule", "regime", "generation", "fidelity",
    "allow_other_processes", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_group_port",
)  # fmt: skip
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is


class RunError(UserError, RuntimeError):
    """A folder holds no run, or not the run that is asked for."""


@dataclass(frozen=True)
class Lines:
    """A JSON-lines file up to the first line that is broken or has no integer `step`."""

    rows: list[dict[str, Any]]
    broken: int | None = None  # number of the broken line, counted from 1
    last: bool = False  # it is the last line, as a process that was killed leaves it


class Run:
    """A run's folder, `outputs/<recipe>/<scale>/seed<seed>`; nothing is read before it is asked for."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config_file, self.metrics_file = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.evaluations_file, self.summary_file = self.path / "eval.jsonl", self.path / "summary.json"
        self.checkpoint_folder, self.records_folder = self.path / "checkpoints", self.path / "tokens"
        self.report_file = self.path / "report.html"

    def _config(self) -> dict[str, Any]:
        if not self.path.is_dir():
            raise RunError(f"run folder not found: {self.path}")
        try:
            config = yaml.load(self.config_file.read_text(encoding="utf-8"), LOADER)
        except (OSError, ValueError, yaml.YAMLError):
            config = None
        if not isinstance(config, dict) or "recipe" not in config:
            raise RunError(f"{self.path} is not a run folder: it has no readable config.yaml of a run")
        capo = config.get("capo")
        if isinstance(capo, dict) and capo.get("mode") is False:
            capo["mode"] = "off"  # unquoted in YAML, off is false
        return config

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved recipe in config.yaml, without `environment`; RunError if the folder holds no run."""
        return {key: value for key, value in self._config().items() if key != "environment"}

    @property
    def environment(self) -> dict[str, Any]:
        """Commit, versions and machine that config.yaml names; empty if it names none."""
        return self._config().get("environment") or {}

    @property
    def label(self) -> str:
        """What the run is called on a page."""
        settings = self.settings
        return f"{settings['recipe']} · {settings.get('scale', '?')} · seed {settings.get('seed', '?')}"

    @property
    def max_steps(self) -> int | None:
        """The step at which the run ends by its settings; None if they do not say."""
        steps = self.settings.get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def summary(self) -> dict[str, Any] | None:
        """The parsed summary.json; None if the run is unfinished or the file is incomplete."""
        try:
            summary = json.loads(self.summary_file.read_text())
        except (OSError, ValueError):
            return None
        return summary if isinstance(summary, dict) and summary.keys() >= set(SUMMARY) else None

    def metrics(self) -> list[dict[str, Any]]:
        """The metric lines, one an optimizer step, up to the first one that is broken or cut off."""
        return read_lines(self.metrics_file).rows

    def rewards(self) -> list[float]:
        """The in-training accuracy of the steps that have one (not those on completions of an earlier step)."""
        return [row["reward"] for row in self.metrics() if row.get("reward") is not None]

    def evaluations(self) -> list[dict[str, Any]]:
        """TEST, one line an evaluated step, by step; empty if it was never measured."""
        return sorted(read_lines(self.evaluations_file).rows, key=lambda row: row["step"])

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, by step."""
        return [path for path in checkpoint_folders(self.checkpoint_folder) if find_damage(path) is None]


def read_lines(path: Path) -> Lines:
    """Read a JSON-lines file that may be missing, or cut off while a line was written."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return Lines(rows, number, number == len(lines))
        rows.append(row)
    return Lines(rows)


def run_of(model: Path) -> Run | None:
    """The run that a model folder is a checkpoint of (`<run>/checkpoints/checkpoint-<step>`); None if of none."""
    for parent in list(model.resolve().parents)[:2]:
        run = Run(parent)
        if run.config_file.is_file() and run.checkpoint_folder.is_dir():
            return run
    return None


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
