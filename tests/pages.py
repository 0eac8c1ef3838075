"""Made-up runs with everything that a report shows: metrics, evaluations and token records."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path

SETTINGS = """recipe: {recipe}
scale: lab
seed: {seed}
max_steps: {planned}
learning_rate: {rate}
capo:
  mode: mask
  max_policy_shift: 1.0
  max_objective_shift: 1.0
environment:
  commit: abc
"""
EVIL = "</script><script>window.broken = 1</script><img src=x onerror=window.broken=1>"


def make_run(folder: Path, steps: int = 40, planned: int | None = None, seed: int = 0, rate: float = 2e-3) -> Path:
    """A run whose reward rises and then falls, with the metrics of CAPO's trainer."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    recipe = folder.parent.parent.name.split(",")[0]
    (folder / "config.yaml").write_text(SETTINGS.format(recipe=recipe, seed=seed, planned=planned or steps, rate=rate))
    rows = [_row(i, steps, draw, rate) for i in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tests = [
        {
            "step": s, "completions": 96 * s, "accepted_tokens": 1800 * s, "test": 0.4 - 0.005 * s,
            "test_stderr": 0.02, "over": 8,
            "tasks": {f"lab_{n}": {"accuracy": 0.05 * n, "stderr": 0.03} for n in range(8)},
        }
        for s in range(0, steps + 1, 10)
    ]  # fmt: skip
    (folder / "eval.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests))
    return folder


def _row(i: int, steps: int, draw: random.Random, rate: float) -> dict:
    reward = 0.35 + 0.4 * math.sin(math.pi * i / steps) + draw.uniform(-0.05, 0.05)
    kl = 1e-4 * math.exp(6 * i / steps) * draw.uniform(0.5, 2)
    times = {"generate": 0.3, "reward": 0.05, "curvature": 0.04, "measure": 0.08, "train": 0.37}
    return {
        "step": i, "reward": reward, "completions": 96 * i, "accepted_tokens": 1800 * i, "grad_norm": 1.5,
        "learning_rate": rate * min(1, i / 5), "entropy": 0.5 * math.exp(-i / steps), "capo/step_scale": 1.0,
        "capo/rejected_frac": 0.001 * i, "capo/rejected_frac_policy": 0.001 * i, "capo/rejected_frac_objective": 0.0,
        "capo/scaled_frac": 0.0, "capo/policy_shift/max": 50 * kl, "capo/policy_shift/p99": 5 * kl,
        "capo/objective_shift/max": 0.5, "capo/objective_shift/p99": 0.1, "capo/batch_objective_shift": -0.01,
        "capo/batch_policy_shift": 0.5 * kl, "capo/measured_kl": kl, "capo/measured_kl_head": 0.3 * kl,
        "capo/measured_objective": 0.012, "capo/kl_spearman": 0.6, "completions/mean_length": 20.0,
        "completions/max_length": 32.0, "loss": 0.01, "accuracy": None,
        **{f"time/{name}": seconds for name, seconds in times.items()}, "time/total": sum(times.values()),
    }  # fmt: skip


def make_record(step: int, completions: int = 24, length: int = 20, seed: int = 0, evil: str = "") -> dict:
    """A token record; every third completion has a token over the bound of m_F, every sixth one over that of m_H."""
    draw = random.Random(seed)
    return {
        "step": step, "lr": 2e-3, "taken_lr": 1e-3, "measured_kl": 0.1,
        "completions": [_completion(i, length, draw, evil) for i in range(completions)],
    }  # fmt: skip


def _completion(index: int, length: int, draw: random.Random, evil: str) -> dict:
    words = ["3", " +", " 4", " =", " 7", "\n", " so", " the", " answer", " is", evil or " 9"]
    tokens = [draw.choice(words) for _ in range(length - 1)] + [evil or "<|im_end|>"]
    advantage = draw.choice([-1.2, 0.8])
    shift = [10 ** draw.uniform(-7, -1) for _ in tokens]
    reason, weight = [0] * length, [1.0] * length
    if index % 3 == 0:
        reason[2], weight[2], shift[2] = (3 if index % 6 == 0 else 1), 0.0, 1.7
    prob = [draw.uniform(0.01, 1) for _ in tokens]
    return {
        "prompt": f"What is 3 + {index}? {evil}", "reward": float(index % 2), "advantage": advantage, "tokens": tokens,
        "prob": prob, "prob_after": [min(1, p * draw.uniform(0.6, 1.3)) for p in prob],
        "entropy": [draw.uniform(0, 2) for _ in tokens], "policy_shift": shift,
        "objective_shift": [math.copysign(s**0.5 / 2, draw.uniform(-1, 2)) for s in shift],
        "gradient_norm": [abs(advantage) * draw.random() for _ in tokens],
        "kl": [s * draw.uniform(0.1, 10) for s in shift], "kl_head": [s * draw.uniform(0.5, 2) for s in shift],
        "weight": weight, "reason": reason,
    }  # fmt: skip


def write_record(folder: Path, name: str, record: dict) -> None:
    """Write it where the trainer does."""
    (folder / "tokens").mkdir(exist_ok=True)
    with gzip.open(folder / "tokens" / f"{name}.json.gz", "wt", encoding="utf-8") as file:
        json.dump(record, file)
