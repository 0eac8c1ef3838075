"""The one folder that a run writes: outputs/<recipe>/<scale>/seed<seed>/.

    config.yaml     the resolved settings, with the commit and the versions
    metrics.jsonl   one object an optimizer step
    summary.json    what the run ended with
    checkpoints/    ordinary Hugging Face folders, each with CAPO's state
    report.html     the curves

A folder belongs to the settings it was made with: the same settings resume it, others are refused.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from open_r1_capo.checkpoint import newest_complete

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify", "open-r1-capo")
# where a run is written or how it is watched does not make it another run
NOT_IDENTITY = ("overwrite", "output_root", "report_to", "run_name", "num_threads")


class RunFolderError(RuntimeError):
    """The folder cannot be used; the message is one sentence for the user."""


class RunFolder:
    """The folder of one run.

    Args:
        path: where it is; created by `open`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.metrics = path / "config.yaml", path / "metrics.jsonl"
        self.summary, self.checkpoints, self.report = path / "summary.json", path / "checkpoints", path / "report.html"

    def check(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Refuse early, before minutes of work, what `open` would refuse; writes nothing.

        Args:
            settings: the resolved recipe.
            overwrite: an earlier run will be thrown away.
        """
        if self.path.exists() and any(self.path.iterdir()):
            self._check_ours()
            if not overwrite:
                self._check_same(settings)

    def open(self, settings: dict[str, Any], overwrite: bool) -> tuple[Path | None, list[str]]:
        """Claim the folder for `settings`, or find where an earlier run of them stopped.

        Args:
            settings: the resolved recipe.
            overwrite: throw an earlier run away.

        Returns:
            The checkpoint to resume from (None: start from the beginning) and sentences about unusable ones.

        Raises:
            RunFolderError: the folder holds something else, or cannot be written.
        """
        try:
            self.check(settings, overwrite)
            if overwrite and self.path.exists():
                shutil.rmtree(self.path)
            if self.path.exists() and any(self.path.iterdir()):
                resume, notes = newest_complete(self.checkpoints)
                self._trim_metrics(int(resume.name.rpartition("-")[2]) if resume else 0)
                return resume, notes
            self.path.mkdir(parents=True, exist_ok=True)
            text = OmegaConf.to_yaml(OmegaConf.create({**settings, "environment": environment()}))
            write_atomically(self.config, text)
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written ({error.strerror or error})") from None
        return None, []

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that has ended, or None."""
        return json.loads(self.summary.read_text()) if self.summary.is_file() else None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metric lines so far; a last line that was cut off is left out."""
        rows = []
        for line in self.metrics.read_text().splitlines() if self.metrics.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one optimizer step's metrics, durable at once."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _trim_metrics(self, step: int) -> None:
        """Forget the metrics after the checkpoint that the run continues from: they will be written again."""
        if self.metrics.is_file():
            rows = [row for row in self.read_metrics() if row["step"] <= step]
            write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def _check_ours(self) -> None:
        if any(self.path.iterdir()) and not self.config.is_file():
            raise RunFolderError(
                f"{self.path} holds files of something else (no config.yaml): choose another output_root"
            )

    def _check_same(self, settings: dict[str, Any]) -> None:
        self._check_ours()
        theirs = OmegaConf.to_container(OmegaConf.load(self.config))
        theirs.pop("environment", None)
        ours = OmegaConf.to_container(OmegaConf.create(settings))
        differing = sorted(
            key for key in ours.keys() | theirs.keys() if key not in NOT_IDENTITY and ours.get(key) != theirs.get(key)
        )
        if differing:
            key = differing[0]
            raise RunFolderError(
                f"{self.path} belongs to a run with other settings ({', '.join(differing)}; {key} was "
                f"{theirs.get(key)!r}, now {ours.get(key)!r}): choose another output_root, or throw the old run away "
                "with OVERWRITE=1"
            )


def environment() -> dict[str, Any]:
    """What else determines a run: the commit, the versions, the machine's kind."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        **{name: version(name) for name in PACKAGES},
    }


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
