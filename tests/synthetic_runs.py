"""Run folders made up for the tests of the figures: their numbers follow from recipe, learning rate and seed."""

import json

import numpy as np

FALLS = {"grpo_aggressive", "drgrpo_aggressive", "reinforce_aggressive"}


def metrics(arm, seed, steps=100, noise=0.03):
    """The metric lines of one run: a rise to 0.9, and for plain methods at a high rate a fall to 0.02."""
    rng = np.random.default_rng([seed, len(arm.label), sum(map(ord, "".join(arm.overrides)))])
    rate = dict(item.split("=") for item in arm.overrides).get("learning_rate", "2e-3")
    high = float(rate) > (1e-3 if arm.recipe in FALLS else 8e-3)
    batch, rows, accepted = (384 if arm.recipe == "grpo_conservative" else 96), [], 0
    for step in range(1, steps + 1):
        rise = 0.33 + 0.57 * (1 - np.exp(-(step - 1) / 25))
        mean = rise if not (high and arm.recipe in FALLS) else max(0.02, rise - 0.06 * max(0, step - 30 - seed))
        kl = 1e-4 * np.exp(rng.normal()) * (20 if high else 1)
        accepted += int(batch * (12 + 8 * mean))
        rows.append({
            "step": step, "completions": batch * step, "accepted_tokens": accepted,
            "reward": float(np.clip(mean + noise * rng.normal(), 0, 1)), "grad_norm": float(np.exp(rng.normal())),
            "capo/rejected_frac": float(0.08 * np.exp(-step / 15) * rng.uniform(0.5, 1)),
            "capo/batch_policy_shift": float(kl * np.exp(0.3 * rng.normal())),
            "capo/batch_objective_shift": float(10 * kl * rng.normal(1, 0.5)), "capo/measured_kl": float(kl),
            "capo/measured_kl_head": float(kl * 0.6), "capo/measured_objective": float(10 * kl),
            "capo/kl_spearman": float(rng.uniform(0.4, 0.7)), "capo/step_scale": 1.0, "capo/skipped_step": 0.0,
            **{f"capo/policy_shift/{k}": float(kl * f) for k, f in (("mean", 1), ("p99", 30))},
            **{f"capo/objective_shift/{k}": float(kl * f * rng.normal(1, 1)) for k, f in (("mean", 3), ("p99", 90))},
            "budget/kl": float(kl), "budget/nats": float(kl * rng.uniform(0.7, 1.2)), "budget/passes": 2.0,
            "budget/alpha": float(1e-3 * rng.uniform(0.5, 2)), "completions/mean_length": 14.0,
            "budget/taken_back": float(step % 50 == 0), "time/generate": 0.2, "time/reward": 0.01,
            "time/curvature": 0.04, "time/measure": 0.05, "time/train": 0.3,
            "time/total": 0.6,
        })  # fmt: skip
    return rows


def write_run(folder, arm, seed, rows=None, tests=True):
    """Write config.yaml, metrics.jsonl and eval.jsonl of one run."""
    rows = metrics(arm, seed) if rows is None else rows
    folder.mkdir(parents=True, exist_ok=True)
    config = f"seed: {seed}\nmax_steps: 100\ntemperature: 0.9\ncapo: {{step_policy_shift: 0.0001}}\n"
    config += f"recipe: {arm.recipe}\nenvironment:\n  commit: c{seed}\n"
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = [{"step": 0, "test": 0.3}, *({"step": r["step"], "test": 0.9 * r["reward"]} for r in rows[9::10])]
    if tests:
        (folder / "eval.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))


def write_experiment(experiment, **changes):
    """Write all runs of an experiment."""
    for arm, seed in experiment.runs():
        write_run(experiment.folder(arm, seed), arm, seed, **changes)
