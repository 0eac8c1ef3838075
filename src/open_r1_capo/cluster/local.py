"""`make train` on this machine: decides whether a recipe trains in one process or in one a GPU, and starts those."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_r1_capo.cluster.vllm import gpu_memory
from open_r1_capo.settings.budget import default_accelerator
from open_r1_capo.settings.recipes import RECIPES, compose_recipe

GRPO = Path(__file__).resolve().parents[1] / "grpo.py"
LAUNCHED = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and accelerate


def local_command(recipe: str, overrides: Sequence[str], settings: Mapping[str, Any], gpus: int) -> list[str] | None:
    """The command that trains with one process a GPU, under `default_accelerator`.

    It is None where training belongs into this process: the recipe runs on the CPU, or there is no GPU.
    """
    if settings.get("use_cpu") or not gpus:
        return None
    config = RECIPES / "accelerate_configs" / f"{default_accelerator(settings)}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*command, "--num_processes", str(gpus), str(GRPO), "--config-name", recipe, *overrides]


def launch_on_gpus(recipe: str, overrides: Sequence[str]) -> None:
    """Replace this process by `local_command`, unless that is None or a launcher has started this process."""
    gpus = 0 if any(name in os.environ for name in LAUNCHED) else len(gpu_memory())
    if gpus:
        command = local_command(recipe, overrides, compose_recipe(recipe, list(overrides)), gpus)
        if command:
            os.execv(command[0], command)
