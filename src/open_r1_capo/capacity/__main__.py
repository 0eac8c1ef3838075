"""Memory and time of a recipe on GPUs that nobody has to have; no model is loaded.

    make plan RECIPE=capo_aggressive SCALE=qwen2.5-math-7b GPUS=4 GPU=h100

Exit codes: 0 it fits; 1 it does not (what would is said); 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from open_r1_capo.capacity.devices import DEVICES, find_device
from open_r1_capo.capacity.planner import make
from open_r1_capo.capacity.shapes import PlanError
from open_r1_capo.capacity.table import as_data, as_text
from open_r1_capo.capacity.workload import ACCELERATORS, ConfigError, Machines, read
from open_r1_capo.runs.folder import RunFolder

CLOCKS = {  # what a run's clocks are called in the plan
    "time/generate": "generation",
    "time/reward": "rewards",
    "time/curvature": "CAPO, all",
    "time/measure": "measured KL",
    "time/train": "forward and backward",
    "time/total": "total",
}


def main(argv: list[str] | None = None) -> int:
    """Plan, and print.

    Args:
        argv: arguments; None takes the process's.

    Returns:
        The exit code.
    """
    options = _parser().parse_intermixed_args(argv)
    try:
        device = find_device(options.gpu or ("cpu" if options.scale.startswith("lab") else "h100"))
        machines = Machines(
            gpus=options.gpus or (1 if device.is_cpu else 4),
            nodes=options.nodes,
            accelerator=options.accelerator,
            generation=options.generation,
            server_gpus=options.server_gpus,
            prompt_tokens=options.prompt_tokens,
            completion_tokens=options.completion_tokens,
            cpu=device.is_cpu,
        )
        plan = make(read(options.recipe, [f"scale={options.scale}", *options.overrides], machines), device)
        measured = measured_seconds(Path(options.run)) if options.run else {}
    except (PlanError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_data(plan, options.seeds, measured), indent=2))
    else:
        print(as_text(plan, options.seeds, measured))
    return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="capo_aggressive")
    parser.add_argument("--scale", default="qwen2.5-math-7b")
    parser.add_argument("--gpus", type=_count, help="of each node; 4, or one process on the CPU")
    parser.add_argument("--nodes", type=_count, default=1)
    parser.add_argument("--gpu", help=f"{', '.join(DEVICES)}, or cpu, which is measured and where the lab runs")
    parser.add_argument("--accelerator", default="zero2", help=", ".join(ACCELERATORS))
    parser.add_argument("--generation", help="transformers, vllm_colocate, vllm_server; by default the recipe's")
    parser.add_argument("--server-gpus", type=_count, help="that only generate, with vllm_server")
    parser.add_argument("--prompt-tokens", type=_count, help="that prompts are padded to, for the time; 256")
    parser.add_argument("--completion-tokens", type=_count, help="likewise; by default the recipe's limit")
    parser.add_argument("--seeds", type=_count, default=5)
    parser.add_argument("--run", help="a run's folder, whose measured seconds are shown beside the estimate")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    return parser


def _count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def measured_seconds(folder: Path) -> dict[str, float]:
    """Medians of a run's clocks, by the plan's names; the first two steps, which load libraries, are left out.

    Args:
        folder: of the run.

    Returns:
        Seconds a step.

    Raises:
        PlanError: no metrics, or none of more than two steps.
    """
    run = RunFolder(folder)
    if not run.metrics_file.is_file():
        raise PlanError(f"{folder} has no metrics.jsonl: name the folder of a run")
    lines = run.metrics()[2:]
    if not lines or not all("time/total" in line for line in lines):
        raise PlanError(f"{folder} has no seconds of more than two steps: let the run go on, or name another")
    return {name: statistics.median(line.get(key, 0.0) for line in lines) for key, name in CLOCKS.items()}


if __name__ == "__main__":
    sys.exit(main())
