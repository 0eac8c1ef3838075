"""The one folder that a run writes: outputs/<recipe>/<scale>/seed<seed>/.

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
import gzip
import json
import os
import platform
import shutil
import subprocess
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from open_r1_capo.training.checkpoint import newest_complete

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder go unnoticed
    fcntl = None

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify", "open-r1-capo")
# what every summary.json has; further keys depend on the run
SUMMARY = ("recipe", "scale", "seed", "steps", "completions", "reward_windows", "accuracy_before", "accuracy_after")
# of a token record, a number or null a token; of the others, whoever reads them says which ones it needs
REQUIRED = ("policy_shift", "objective_shift", "weight", "reason")
TOKEN_COLUMNS = (*REQUIRED, "prob", "prob_after", "entropy", "gradient_norm", "kl", "kl_head")
# where a run is written, how it is watched, or where its server is, does not make it another run; nor does the name of
# a group of settings that are compared themselves
NOT_IDENTITY = ("overwrite", "output_root", "report_to", "run_name", "num_threads", "token_records", "generation")
NOT_IDENTITY += ("allow_other_processes",)
NOT_IDENTITY += tuple(f"vllm_{name}" for name in ("server_base_url", "server_host", "server_port", "group_port"))


class RunFolderError(RuntimeError):
    """The folder cannot be used; the message is one sentence for the user."""


class RunFolder:
    """The folder of one run.

    Args:
        path: where it is; created by `claim`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.metrics = path / "config.yaml", path / "metrics.jsonl"
        self.summary, self.checkpoints, self.report = path / "summary.json", path / "checkpoints", path / "report.html"
        self._lock = None  # an open file, locked

    def check(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Refuse early, before minutes of work, what `claim` would refuse; writes nothing.

        Args:
            settings: the resolved recipe.
            overwrite: an earlier run will be thrown away.

        Raises:
            RunFolderError: the folder holds something else, or a run with other settings.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file, not a run's folder: choose another output_root")
        if any(self.path.iterdir()):
            differing = self.differences(settings)
            if differing and not overwrite:
                key, (theirs, ours) = next(iter(differing.items()))
                raise RunFolderError(
                    f"{self.path} belongs to a run with other settings ({', '.join(differing)}; {key} was {theirs!r}, "
                    f"now {ours!r}): choose another output_root, or throw the old run away with OVERWRITE=1"
                )

    @contextmanager
    def claim(self, settings: dict[str, Any], overwrite: bool) -> Iterator[tuple[Path | None, list[str]]]:
        """Take the folder for a run; if the block then fails, the folder is as it was before.

        Args:
            settings: the resolved recipe.
            overwrite: put an earlier run aside, and throw it away once the block has succeeded.

        Yields:
            The checkpoint to resume from (None: start from the beginning) and sentences about unusable ones.

        Raises:
            RunFolderError: the folder holds something else, is in use, or cannot be written.
        """
        aside = self.path.with_name(f".{self.path.name}.overwritten")
        if aside.exists() and not self.path.exists():  # an overwriting call was killed half way
            os.rename(aside, self.path)
        self.check(settings, overwrite)
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        fresh = overwrite or not self.path.exists() or not any(self.path.iterdir())
        made = False  # by us, so that it may be thrown away
        try:
            try:
                if overwrite and self.config.exists():
                    self._take_lock()
                    os.rename(self.path, aside)
                if fresh:
                    self._make(settings)
                    made = True
                else:
                    self._take_lock()
            except OSError as error:
                raise RunFolderError(f"{self.path} cannot be written ({error.strerror or error})") from None
            yield (None, []) if fresh else newest_complete(self.checkpoints)
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
        """Put a new folder in its place, which is locked and says what it is from the start: the first maker wins."""
        new = RunFolder(self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}"))
        new.path.mkdir(parents=True)
        try:
            content = OmegaConf.create({**settings, "environment": environment()})
            write_atomically(new.config, OmegaConf.to_yaml(content))
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
        if fcntl is None:
            return
        self._lock = self.config.open("r+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(f"another process is training in {self.path}") from None

    def release(self) -> None:
        """Let another run, of this process too, take the folder."""
        if self._lock is not None:
            self._lock.close()

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that has ended, or None; what lacks a key of SUMMARY is no summary."""
        try:
            summary = json.loads(self.summary.read_text())
        except (OSError, ValueError):
            return None
        return summary if isinstance(summary, dict) and summary.keys() >= set(SUMMARY) else None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metric lines so far; a last line that was cut off is left out."""
        return _complete_lines(self.metrics)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """What `make eval RUN=…` found, a line a checkpoint, in the order of their steps; empty if it never ran."""
        return sorted(_complete_lines(self.path / "eval.jsonl"), key=lambda row: row["step"])

    def append_evaluation(self, row: dict[str, Any]) -> None:
        """Add the TEST line of a step, in the place of an earlier one of that step or of later ones."""
        rows = [old for old in self.read_evaluations() if old["step"] < row["step"]]
        write_atomically(self.path / "eval.jsonl", "".join(json.dumps(one) + "\n" for one in [*rows, row]))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one optimizer step's metrics, durable at once."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def trim_metrics(self, step: int) -> None:
        """Forget the metrics after the step that the run continues from: they will be written again."""
        if self.metrics.is_file():
            rows = [row for row in self.read_metrics() if row["step"] <= step]
            write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def _their_settings(self) -> dict[str, Any]:
        """The settings that the folder was made with."""
        try:
            theirs = OmegaConf.to_container(OmegaConf.load(self.config))
        except (OSError, OmegaConfBaseException, YAMLError):
            theirs = None
        if not isinstance(theirs, dict) or not {"recipe", "environment"} <= theirs.keys():
            raise RunFolderError(
                f"{self.path} holds files of something else (no config.yaml of a run): choose another output_root"
            )
        del theirs["environment"]
        return theirs

    def differences(self, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Compare the settings that make a run what it is.

        Args:
            settings: a resolved recipe.

        Returns:
            Theirs and ours, by key, where they differ.

        Raises:
            RunFolderError: the folder holds something else than a run.
        """
        theirs, ours = self._their_settings(), OmegaConf.to_container(OmegaConf.create(settings))
        keys = sorted((ours.keys() | theirs.keys()) - set(NOT_IDENTITY))
        return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}


def environment() -> dict[str, Any]:
    """What else determines a run: the commit, the versions, the machine's kind."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **{name: version(name) for name in PACKAGES},
    }


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file up to a line that was cut off or has no step; none if there is no file."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def read_record(path: Path, required: Sequence[str] = REQUIRED) -> dict[str, Any]:
    """Read a token record whose columns fit its tokens.

    Args:
        path: the file.
        required: the columns that every completion must have.

    Returns:
        The record.

    Raises:
        ValueError: it cannot be read, or is no such record; the message says what is wrong with it.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("it has no step")
    if not isinstance(record.get("completions"), list):
        raise ValueError("it has no completions")
    for completion in record["completions"]:
        tokens = completion.get("tokens") if isinstance(completion, dict) else None
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ValueError("a completion has no tokens")
        if "advantage" not in completion or not isinstance(completion["advantage"], int | float | None):
            raise ValueError("a completion has no advantage")
        for key in TOKEN_COLUMNS:
            column = completion.get(key)
            if (column is None and key in required) or (column is not None and not _fits(column, len(tokens))):
                raise ValueError(f"{key} does not have a value for every token")
    return record


def _fits(column: Any, length: int) -> bool:
    """Whether a column has for every token a number, or null where it was not finite or not measured."""
    known = isinstance(column, list) and len(column) == length
    return known and all(isinstance(value, int | float | None) for value in column)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
