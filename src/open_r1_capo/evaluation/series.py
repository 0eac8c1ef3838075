"""Evaluates every checkpoint of a run and writes eval.jsonl beside its metrics.jsonl."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from open_r1_capo.evaluation import results
from open_r1_capo.evaluation.model import resolve, training_settings
from open_r1_capo.evaluation.run import evaluate, report
from open_r1_capo.evaluation.server import EvalError
from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.tasks.data import DataError

KEPT = ("completions", "accepted_tokens")  # the two horizontal axes of the curves


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """List the checkpoints of a run that were written to the end.

    Args:
        run: Its folder.

    Returns:
        Step and folder of each, in order.

    Raises:
        EvalError: If there is none.
    """
    found = [
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in (run / "checkpoints").glob("checkpoint-*")
        if folder.name.rpartition("-")[2].isdigit() and (folder / "complete.json").exists()
    ]
    if not found:
        raise EvalError(f"{run} holds no complete checkpoint (checkpoints/checkpoint-<step>)")
    return sorted(found)


def progress(run: Path) -> dict[int, dict]:
    """Read how far the run had come at each step.

    Args:
        run: Its folder.

    Returns:
        completions and accepted_tokens by step; empty without a metrics.jsonl.
    """
    return {row["step"]: {key: row.get(key) for key in KEPT} for row in RunFolder(run).metrics()}


def line(step: int, found: dict, at: dict) -> dict:
    """Make the line of a checkpoint.

    Args:
        step: Its optimizer step.
        found: What its results.json holds.
        at: completions and accepted_tokens at that step.

    Returns:
        step, completions, accepted_tokens, test, test_stderr, over, and each test set's accuracy and stderr.
    """
    test = found["test"]
    tasks = {name: {key: row[key] for key in ("accuracy", "stderr")} for name, row in found["tasks"].items()}
    head = {"step": step} | {key: at.get(key) for key in KEPT}
    return head | {"test": test["accuracy"], "test_stderr": test["stderr"], "over": test["over"], "tasks": tasks}


def write_series(run: Path, lines: Sequence[dict]) -> None:
    """Write eval.jsonl.

    Args:
        run: Folder of the run.
        lines: One a checkpoint.
    """
    text = "".join(json.dumps(one) + "\n" for one in sorted(lines, key=lambda one: one["step"]))
    results.write_atomically(run / "eval.jsonl", text)


def evaluate_run(options: argparse.Namespace) -> None:
    """Evaluate the base model and every checkpoint of a run; eval.jsonl grows with each.

    Args:
        options: The command line.

    Raises:
        EvalError: If the folder holds no complete checkpoint, or the run has measured TEST itself.
        DataError: If a test set cannot be read.
    """
    run = options.run
    folders, at, lines = checkpoints(run), progress(run), []
    settings = training_settings(folders[0][1])
    if (settings.get("evaluation") or {}).get("suite"):
        raise EvalError(
            f"{run} measured TEST while it trained (evaluation.suite), and its eval.jsonl is kept: evaluate a "
            "checkpoint by MODEL=<run folder>/checkpoints/checkpoint-<step>"
        )
    base = settings.get("model_name_or_path")
    jobs = [(step, str(folder), f"checkpoint-{step}") for step, folder in folders]
    if base:
        jobs.insert(0, (0, base, "base"))
    for step, name, label in jobs:
        out = (options.out or run / "eval") / label
        try:
            found = evaluate(resolve(name, settings.get("lab")), options, out)
        except (DataError, EvalError) as error:
            if step:
                raise
            print(f"eval: the curve starts without the base model: {error}", file=sys.stderr)
            continue
        start = dict.fromkeys(KEPT, 0)
        lines.append(line(step, found, at.get(step, {}) if step else start))
        write_series(run, lines)
        report(found, out)
    print(f"written: {run / 'eval.jsonl'}")
