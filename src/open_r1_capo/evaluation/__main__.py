"""Evaluates a model, or every checkpoint of a run, on eight test sets: `make eval MODEL=…` or `make eval RUN=…`.

    python -m open_r1_capo.evaluation --model MODEL [--tasks open|lab|gsm8k,…] [--samples N]
    python -m open_r1_capo.evaluation --run outputs/grpo_aggressive/lab/seed0

Writes results.json and results.md into --out (outputs/eval/<model>, or <run>/eval/<checkpoint>), and for a run also
<run>/eval.jsonl with one line a checkpoint. A second call goes on where the first one stopped: test sets whose key is
unchanged are not evaluated again, and of the others, requests that were answered before are not sent again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from open_r1_capo.evaluation.backends import ROOT
from open_r1_capo.evaluation.evaluate import evaluate
from open_r1_capo.evaluation.model import resolve
from open_r1_capo.evaluation.series import evaluate_run
from open_r1_capo.runs.exit import run_cli


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and check ranges."""
    parser = argparse.ArgumentParser(prog="make eval", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder, hub id, or `lab`")
    which.add_argument("--run", type=Path, help="folder of a run, to evaluate all its checkpoints")
    parser.add_argument("--tasks", default="", help="open, lab, or names; by default the model's own suite")
    parser.add_argument("--samples", type=int, help="answers a problem (default: 1, AMC and AIME 16, lab 4)")
    parser.add_argument("--limit", type=int, help="problems a test set, for a trial")
    parser.add_argument("--data", type=Path, help="folder with <task>.jsonl, instead of the hub")
    parser.add_argument("--out", type=Path, help="results folder")
    parser.add_argument("--backend", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: 3072, or what the context allows)")
    parser.add_argument("--max-length", type=int, help="longest prompt and answer together, in place of the former")
    parser.add_argument("--prompt", help="file with the user's turn, {problem} in it; without a system turn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("samples", "limit", "max_tokens", "max_length"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not (options.temperature >= 0 and 0 < options.top_p <= 1):
        parser.error("--temperature must be at least 0, and --top-p above 0 and at most 1")
    return options


def evaluate_model(options: argparse.Namespace) -> None:
    """Evaluate one model, by default into outputs/eval/<its name>."""
    name = options.model.strip("/").replace("/", "--")
    evaluate(resolve(options.model), options, options.out or ROOT / "outputs" / "eval" / name)


def terminate(signum: int, frame: object) -> None:
    """Exit on SIGTERM and SIGHUP such that every `finally` runs and no server stays behind."""
    sys.exit(128 + signum)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate what the command line asks for."""
    options = parse(arguments)
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, terminate)
    command = evaluate_run if options.run else evaluate_model
    return run_cli(lambda: command(options), "interrupted; run the same command to do the remaining test sets")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
