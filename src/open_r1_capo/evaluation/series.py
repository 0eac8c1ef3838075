"""Evaluates every checkpoint of a run and writes eval.jsonl beside its metrics.jsonl."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping

from open_r1_capo.evaluation import EvalError
from open_r1_capo.evaluation.evaluate import evaluate
from open_r1_capo.evaluation.model import resolve
from open_r1_capo.runs.checkpoints import step_of
from open_r1_capo.runs.exit import UserError
from open_r1_capo.runs.run import Run, write_atomically

KEPT = ("completions", "accepted_tokens")  # the two horizontal axes of the curves


def line(step: int, evaluation: dict, metrics: Mapping) -> dict:
    """A checkpoint's line of eval.jsonl, from its results.json and the metrics of its step."""
    test = evaluation["test"]
    tasks = {name: {key: row[key] for key in ("accuracy", "stderr")} for name, row in evaluation["tasks"].items()}
    head = {"step": step} | {key: metrics.get(key) for key in KEPT}
    return head | {"test": test["accuracy"], "test_stderr": test["stderr"], "over": test["over"], "tasks": tasks}


def evaluate_run(options: argparse.Namespace) -> None:
    """Evaluate a run's base model and every checkpoint; eval.jsonl grows with each. A UserError if one cannot be."""
    run = Run(options.run)
    checkpoints = run.checkpoints()
    if not checkpoints:
        raise EvalError(f"{run.path} holds no complete checkpoint (checkpoints/checkpoint-<step>)")
    settings = run.settings
    if (settings.get("evaluation") or {}).get("suite"):
        raise EvalError(
            f"{run.path} measured TEST while it trained (evaluation.suite), and its eval.jsonl is kept: evaluate a "
            "checkpoint by MODEL=<run folder>/checkpoints/checkpoint-<step>"
        )
    metrics = {row["step"]: row for row in run.metrics()} | {0: dict.fromkeys(KEPT, 0)}
    jobs = [(step_of(folder), str(folder), folder.name) for folder in checkpoints]
    if base := settings.get("model_name_or_path"):
        jobs.insert(0, (0, base, "base"))
    lines = []
    for step, name, label in jobs:
        try:
            evaluation = evaluate(resolve(name, settings), options, (options.out or run.path / "eval") / label)
        except UserError as error:
            if step:
                raise
            print(f"eval: the curve starts without the base model: {error}", file=sys.stderr)
            continue
        lines.append(json.dumps(line(step, evaluation, metrics.get(step, {}))) + "\n")
        write_atomically(run.evaluations_file, "".join(lines))
    print(f"written: {run.evaluations_file}")
