r"""Train a policy with GRPO, Dr.GRPO, REINFORCE or their curvature-aware forms, from a recipe.

    python -m open_r1_capo.grpo --config-name capo_aggressive seed=0 learning_rate=1e-4

A recipe with `use_cpu: true`, as every lab's, trains in this process. Otherwise, where there are GPUs, this process
becomes `accelerate launch` under ZeRO-2 with one process a GPU; to choose another accelerator, launch this file:

    accelerate launch --config_file recipes/accelerate_configs/fsdp.yaml --num_processes 4 src/open_r1_capo/grpo.py \
        --config-name capo_aggressive scale=qwen2.5-math-7b

Exit codes: 0 done; 2 the input cannot be used (one sentence says why, nothing was overwritten); 85 stopped at a
checkpoint by SIGTERM or SIGUSR1, the same command goes on; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys

from open_r1_capo.cluster.local import launch_on_gpus
from open_r1_capo.runs.exit import run_cli
from open_r1_capo.settings.recipes import compose_recipe, known_recipes


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m open_r1_capo.grpo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config-name", default="grpo_budget", help=f"one of {', '.join(known_recipes())}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a field of TRL's GRPOConfig or of ours")
    options = parser.parse_args(argv)
    return run_cli(lambda: train(options.config_name, options.overrides))


def train(recipe: str, overrides: list[str]) -> int:
    """Train in this process, or in one a GPU that take its place; returns the exit code."""
    compose_recipe(recipe, overrides)  # a mistyped word is answered before those seconds
    launch_on_gpus(recipe, overrides)
    from open_r1_capo.training.run import command  # seconds of imports that the launching process does not need

    return command(recipe, overrides)


if __name__ == "__main__":
    sys.exit(main())
