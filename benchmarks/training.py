"""A whole training step with CAPO on and off: the lab policy as it is, or one as wide as the paper's (D = 896).

Run as a script it trains one variant for a few steps and prints the seconds of each as JSON. The learning rate is
1e-12, so that every variant generates the very same completions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from common import in_child
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.tasks.lab.policy import base_policy
from open_r1_capo.training.build import build, known_rewards, load_dataset, make_trainer
from open_r1_capo.training.run import quiet

VARIANTS = {
    "off": ["capo.mode=off"],
    "on": ["capo.mode=mask", "capo.measure_kl=0"],
    "on, measuring the KL": ["capo.mode=mask", "capo.measure_kl=1"],
}
WARM_UP = 2  # steps that load libraries and fill the table of moments
WIDE = ["completions_per_step=8", "per_device_train_batch_size=8", "max_completion_length=256"]


class Clock(TrainerCallback):
    """Wall and processor seconds of each step, generation included."""

    def __init__(self):
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.clocked: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Start."""
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop."""
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])

    def on_log(self, args, state, control, logs, **kwargs):
        """The trainer's own clock: the whole step over what is left of it without CAPO."""
        if "time/total" in logs:
            curvature = logs.get("time/curvature", 0.0)
            self.clocked.append(logs["time/total"] / (logs["time/total"] - curvature))


def wide_policy(folder: str, dim: int) -> str:
    """The lab policy's architecture with another width, untrained, in a folder."""
    lab = base_policy()
    config = AutoConfig.from_pretrained(lab)
    config.hidden_size, config.intermediate_size, config.max_position_embeddings = dim, 2 * dim, 512
    config.head_dim = dim // config.num_attention_heads
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(lab).save_pretrained(folder)
    return folder


def step_seconds(variant: str, dim: int | None, steps: int) -> dict[str, list[float]]:
    """Train one variant.

    Args:
        variant: one of `VARIANTS`.
        dim: the width, or None for the lab policy.
        steps: measured steps.

    Returns:
        `wall` and `cpu`, seconds of each measured step, and `clocked`, its ratio to itself without CAPO.
    """
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        model = wide_policy(f"{folder}/policy", dim) if dim else str(base_policy())
        common = ["scale=lab", "save_strategy=no", "learning_rate=1e-12", f"max_steps={WARM_UP + steps}"]
        recipe = "grpo_aggressive" if variant == "off" else "capo_aggressive"
        settings = compose_recipe(recipe, [*common, *(WIDE if dim else []), *VARIANTS[variant]])
        config, args = build({**settings, "output_root": f"{folder}/runs"})
        if dim:
            args.generation_kwargs = {"min_new_tokens": args.max_completion_length}
        torch.set_num_threads(1)
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        dataset = load_dataset(config, tokenizer, 0)
        trainer, clock = make_trainer(config, args, known_rewards(config), model, tokenizer, dataset), Clock()
        trainer.add_callback(clock)
        trainer.train()
    return {name: values[WARM_UP:] for name, values in vars(clock).items() if isinstance(values, list)}


def compare(dim: int | None, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """(d) the step's time in every variant, each in processes of its own that take turns.

    Args:
        dim: the width, or None for the lab policy.
        steps: measured steps a process.
        rounds: processes a variant.

    Returns:
        Per variant, the median milliseconds; `ratio`, the median over matching steps of the processor time to that of
        `off` (the same step generates the same completions in every variant); and `clocked`, the median ratio of a
        step to itself without CAPO, which other work on the machine disturbs least.
    """
    seconds: dict[str, dict[str, list[float]]] = {variant: defaultdict(list) for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            run = in_child(str(Path(__file__)), variant, f"--dim={dim or 0}", f"--steps={steps}")
            for name, values in run.items():
                seconds[variant][name] += values
    off = seconds["off"]["cpu"]
    return {
        variant: {
            "wall_ms": 1e3 * statistics.median(times["wall"]),
            "cpu_ms": 1e3 * statistics.median(times["cpu"]),
            "ratio": statistics.median(on / without for on, without in zip(times["cpu"], off, strict=True)),
            "clocked": statistics.median(times["clocked"]),
        }
        for variant, times in seconds.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--dim", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    print(json.dumps(step_seconds(options.variant, options.dim or None, options.steps)))
