"""What the lab's policies are like, and whether reinforcement learning teaches them: one table row a scale.

    .venv/bin/python benchmarks/lab_scales.py [SCALE ...] [--problems 500] [--steps 40]

Makes each policy that the cache does not have, measures it on held-out problems, and trains it by GRPO at a rate that
is safe on all of them. The rows of `docs/lab.md` come from here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_r1_capo.settings.recipes import RECIPES, compose_recipe
from open_r1_capo.settings.run import RunConfig
from open_r1_capo.tasks.held_out import held_out_accuracy
from open_r1_capo.tasks.lab import task
from open_r1_capo.tasks.lab.policy import POLICY, base_policy
from open_r1_capo.tasks.rewards import get_reward_funcs
from open_r1_capo.training.build import build
from open_r1_capo.training.run import quiet, train

COLUMNS = (
    "scale",
    "vocabulary",
    "pretraining, core s",
    "sampled",
    "greedy",
    "tokens a completion",
    "entropy, nats",
    "reward before",
    "after",
    "RL step, core s",
)
WINDOW = 5  # steps whose rewards are averaged, before and after
LEARNING_RATE = 2e-4


def accuracies(run: RunConfig, length: int, problems: int) -> dict[str, float]:
    """Measure the base policy on held-out problems of the variant that it is trained on.

    Args:
        run: the composed settings.
        length: longest completion, in tokens.
        problems: how many.

    Returns:
        Processor seconds of pretraining, size of the vocabulary, accuracy at T 0.9 and greedy, tokens of a sampled
        completion.
    """
    folder = base_policy(settings=run.lab)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (reward,) = get_reward_funcs(["accuracy"])
    rows = task.problems("test", problems, variant=run.data.variant)
    sampled, greedy = (
        held_out_accuracy(model, tokenizer, rows, reward, temperature=t, max_new_tokens=length) for t in (0.9, 0)
    )
    return {
        "vocabulary": len(tokenizer),
        "pretraining": json.loads((folder / POLICY.manifest).read_text(encoding="utf-8")).get("processor_seconds"),
        "sampled": sampled["accuracy"],
        "greedy": greedy["accuracy"],
        "length": sampled["mean_completion_length"],
    }


def learning(scale: str, steps: int) -> dict[str, float]:
    """Train the base policy by plain GRPO for some steps.

    Args:
        scale: one of the lab's.
        steps: optimizer steps.

    Returns:
        Mean token entropy of the base policy at T 0.9 in nats, mean reward of the first and of the last steps, mean
        processor seconds of a step (one thread; the scoring by other processes is not in it).
    """
    changes = [f"scale={scale}", f"learning_rate={LEARNING_RATE}", f"max_steps={steps}", "capo.mode=off",
               "save_strategy=no", "evaluation.problems=0"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        start = time.process_time()
        train(compose_recipe("grpo_aggressive", changes) | {"output_root": folder})
        seconds = time.process_time() - start
        (path,) = Path(folder).rglob("metrics.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] for row in rows]
    return {
        "entropy": rows[0]["entropy"],
        "before": statistics.mean(rewards[:WINDOW]),
        "after": statistics.mean(rewards[-WINDOW:]),
        "seconds": seconds / len(rows),
    }


def row(scale: str, problems: int, steps: int) -> str:
    """Measure one scale.

    Args:
        scale: one of the lab's.
        problems: held-out problems.
        steps: of training.

    Returns:
        A row of the table.
    """
    run, args = build(compose_recipe("grpo_aggressive", [f"scale={scale}"]))
    found: dict[str, Any] = accuracies(run, args.max_completion_length, problems) | learning(scale, steps)
    first = [f"`{scale}`", str(found["vocabulary"]), str(found["pretraining"] or "")]
    numbers = [f"{found[key]:.2f}" for key in ("sampled", "greedy")] + [f"{found['length']:.0f}"]
    numbers += [f"{found[key]:.2f}" for key in ("entropy", "before", "after", "seconds")]
    return f"| {' | '.join(first + numbers)} |"


def main() -> None:
    """Print the table."""
    known = sorted(path.stem for path in (RECIPES / "scale").glob("lab*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("scales", nargs="*", choices=[*known, []], default=known, help=", ".join(known))
    parser.add_argument("--problems", type=int, default=500, help="held-out problems of each measurement")
    parser.add_argument("--steps", type=int, default=40, help="of the training")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for scale in options.scales:
        print(row(scale, options.problems, options.steps), flush=True)


if __name__ == "__main__":
    sys.exit(main())
