"""Estimate the GPU memory and disk that a recipe needs, and what would fit if it does not; no GPU is used.

    make plan RECIPE=capo_aggressive SCALE=qwen2.5-math-7b GPUS=4 GPU=h100

Exit codes: 0 it fits; 1 it does not; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys

from open_r1_capo.capacity.devices import MEMORY, find_device
from open_r1_capo.capacity.fit import estimate
from open_r1_capo.capacity.table import as_data, as_text
from open_r1_capo.capacity.workload import ACCELERATORS, Machines, read
from open_r1_capo.runs.exit import positive, run_cli
from open_r1_capo.settings.budget import default_accelerator
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.values import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Estimate, and print."""
    options = _parser().parse_intermixed_args(argv)
    return run_cli(lambda: command(options))


def command(options: argparse.Namespace) -> int:
    """Print the estimate; returns 0 if the recipe fits and 1 if it does not.

    Raises:
        ConfigError: the recipe cannot be used, or trains LoRA adapters.
    """
    chosen = [f"scale={options.scale}", *([f"generation={options.generation}"] if options.generation else [])]
    settings = compose_recipe(options.recipe, [*chosen, *options.overrides])
    if settings.get("use_peft"):
        raise ConfigError(
            "make plan counts gradients and Adam's moments of every weight, of which LoRA needs hardly any: leave "
            "use_peft out, and take the result as an upper bound"
        )
    device = find_device(options.gpu or ("cpu" if settings.get("use_cpu") else "h100"))
    gpus = options.gpus or (1 if device.is_cpu else 4)
    accelerator = options.accelerator or default_accelerator(settings)
    machines = Machines(gpus, options.nodes, accelerator, options.server_gpus, device.is_cpu)
    result = estimate(read(settings, machines), device)
    print(json.dumps(as_data(result), indent=2) if options.json else as_text(result, options.seeds))
    return 0 if result.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="capo_aggressive")
    parser.add_argument("--scale", default="qwen2.5-math-7b")
    parser.add_argument("--gpus", type=positive, help="of each node; 4, or one process on the CPU")
    parser.add_argument("--nodes", type=positive, default=1)
    parser.add_argument("--gpu", help=f"{', '.join(MEMORY)}, or cpu; h100, or cpu where the recipe runs on it")
    parser.add_argument("--accelerator", help=f"{', '.join(ACCELERATORS)}; by default that of make train")
    parser.add_argument("--generation", help="transformers, vllm_colocate, vllm_server; by default the recipe's")
    parser.add_argument("--server-gpus", type=positive, help="that only generate, with vllm_server")
    parser.add_argument("--seeds", type=positive, default=5, help="whose checkpoints the disk holds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    return parser


if __name__ == "__main__":
    sys.exit(main())
