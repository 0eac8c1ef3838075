"""Write a run's folder, `outputs/<recipe>/<scale>/seed<seed>/`, the only one that a run writes.

    config.yaml     the resolved settings, with the commit and the versions
    metrics.jsonl   one object an optimizer step
    eval.jsonl      TEST, one object an evaluated step
    summary.json    what the run ended with
    tokens/         what became of every token, of a few steps
    checkpoints/    ordinary Hugging Face folders, each with CAPO's state
    report.html     the curves

A folder belongs to the settings it was made with: the same settings resume it, others are refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from open_r1_capo.runs.checkpoints import checkpoint_folders, newest_complete
from open_r1_capo.runs.exit import UserError
from open_r1_capo.runs.run import NOT_IDENTITY, Run, RunError, write_atomically

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify", "open-r1-capo")


class RunFolderError(UserError, RuntimeError):
    """The folder cannot be used for this run."""


class RunFolder(Run):
    """A run's folder, for the process that trains in it: locked, and made or taken over as a whole by `claim`."""

    def __init__(self, path: Path | str):
        super().__init__(path)
        self._lock = None  # an open file, locked

    def check(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Refuse before minutes of work what `claim` would refuse; writes nothing.

        Raises:
            RunFolderError: the folder holds something else, or a run with other settings and not `overwrite`.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file, not a run's folder: choose another output_root")
        if any(self.path.iterdir()):
            differing = _single(self.differences(settings))
            if differing and not overwrite and not self.stepless:
                key, (theirs, ours) = next(iter(differing.items()))
                raise RunFolderError(
                    f"{self.path} belongs to a run with other settings ({', '.join(differing)}; {key} was {theirs!r}, "
                    f"now {ours!r}): give this one a folder of its own with variant=<name> (in ARGS) or another "
                    "output_root, or throw the old run away with OVERWRITE=1"
                )

    @property
    def stepless(self) -> bool:
        """Whether the run has come to no step, so that nothing is lost with it."""
        begun = self.metrics_file.is_file() and self.metrics_file.stat().st_size > 0
        return not (begun or self.summary_file.exists() or checkpoint_folders(self.checkpoint_folder))

    def differences(self, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The settings (theirs, ours) by key that differ and make this another run than the folder's.

        Raises:
            RunFolderError: the folder holds something else than a run.
        """
        try:
            theirs, ours = self.settings, OmegaConf.to_container(OmegaConf.create(settings))
        except RunError:
            raise RunFolderError(
                f"{self.path} holds files of something else (no config.yaml of a run): choose another output_root"
            ) from None
        keys = sorted((ours.keys() | theirs.keys()) - set(NOT_IDENTITY))
        return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}

    @contextmanager
    def claim(self, settings: dict[str, Any], overwrite: bool) -> Iterator[tuple[Path | None, list[str]]]:
        """Take the folder for a run; if the block then fails, the folder is as it was before.

        With `overwrite`, an earlier run is put aside, and thrown away once the block has succeeded.

        Yields:
            The checkpoint to resume from (None: start from the beginning) and sentences about unusable ones.

        Raises:
            RunFolderError: the folder holds something else, is in use, or cannot be written.
        """
        aside = self.path.with_name(f".{self.path.name}.overwritten")
        if aside.exists() and not self.path.exists():  # an overwriting call was killed half way
            os.rename(aside, self.path)
        self.check(settings, overwrite)
        if self.config_file.exists() and self.stepless and self.differences(settings):
            overwrite = True
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        fresh = overwrite or not self.path.exists() or not any(self.path.iterdir())
        made = False  # by us, so that it may be thrown away
        try:
            try:
                if overwrite and self.config_file.exists():
                    self._take_lock()
                    os.rename(self.path, aside)
                if fresh:
                    self._make(settings)
                    made = True
                else:
                    self._take_lock()
            except OSError as error:
                raise RunFolderError(f"{self.path} cannot be written ({error.strerror or error})") from None
            yield (None, []) if fresh else newest_complete(self.checkpoint_folder)
        except BaseException:
            if made:
                shutil.rmtree(self.path, ignore_errors=True)
            if aside.exists() and not self.path.exists():
                os.rename(aside, self.path)
            for folder in missing:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _make(self, settings: dict[str, Any]) -> None:
        """Create the folder atomically: lock a temporary sibling, then rename it. Of two processes, the first wins."""
        new = RunFolder(self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}"))
        new.path.mkdir(parents=True)
        try:
            write_atomically(new.config_file, OmegaConf.to_yaml({**settings, "environment": environment()}))
            new._take_lock()
            os.rename(new.path, self.path)
        except OSError as error:
            shutil.rmtree(new.path, ignore_errors=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise RunFolderError(f"another process is training in {self.path}") from None
            raise
        self._lock = new._lock

    def _take_lock(self) -> None:
        """Keep other runs out until `release`, or until this process ends, however it ends."""
        self._lock = self.config_file.open("r+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(f"another process is training in {self.path}") from None

    def release(self) -> None:
        """Let another run, of this process too, take the folder."""
        if self._lock is not None:
            self._lock.close()

    def append_evaluation(self, row: dict[str, Any]) -> None:
        """Add the TEST line of a step, in the place of an earlier one of that step or of later ones."""
        rows = [old for old in self.evaluations() if old["step"] < row["step"]]
        write_atomically(self.evaluations_file, _json_lines([*rows, row]))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one optimizer step's metrics, durable at once."""
        with self.metrics_file.open("a") as file:
            file.write(_json_lines([row]))
            file.flush()
            os.fsync(file.fileno())

    def trim_metrics(self, step: int) -> None:
        """Forget the metrics after the step that the run continues from: they will be written again."""
        if self.metrics_file.is_file():
            write_atomically(self.metrics_file, _json_lines(row for row in self.metrics() if row["step"] <= step))


def _single(differing: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """The differences (theirs, ours) with those of a group by their full names, such as `capo.mode`."""
    found = {}
    for key, (theirs, ours) in differing.items():
        if isinstance(theirs, dict) and isinstance(ours, dict):
            pairs = {name: (theirs.get(name), ours.get(name)) for name in sorted(theirs.keys() | ours.keys())}
            found |= _single({f"{key}.{name}": pair for name, pair in pairs.items() if pair[0] != pair[1]})
        else:
            found[key] = (theirs, ours)
    return found


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def environment() -> dict[str, Any]:
    """What else determines a run: the commit, the versions, the machine's kind."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **{name: version(name) for name in PACKAGES},
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        return "unknown"
