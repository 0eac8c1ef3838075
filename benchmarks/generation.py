"""Train the lab with each generation backend of this machine, and compare their seconds and log-probabilities.

    .venv/bin/python benchmarks/generation.py --steps 20

Prints a Markdown table. On CPUs it needs `.venv-vllm` (`make serve` installs it); a server is started and ended here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from open_r1_capo.cluster.vllm import (
    DEVELOPMENT,
    FOR_TRAINING,
    free_port,
    serve,
    vllm_command,
    vllm_environment,
    vllm_python,
)
from open_r1_capo.tasks.lab.policy import base_policy
from open_r1_capo.training import run

DIFFERENCE = "sampling/sampling_logp_difference"


def main() -> int:
    """Run the backends one after another.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = vllm_command(str(vllm_python()), base_policy(), port, [], None, **FOR_TRAINING)
    environment = {**vllm_environment(on_cpu=True), **DEVELOPMENT}
    print(
        "| generation | seconds a step | of them generating | mean difference, nats | largest |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        for name in ("transformers", "vllm_colocate", "vllm_server"):
            extra = []
            if name == "vllm_server":
                stack.enter_context(serve(command, f"{url}/health", Path(scratch) / "server.log", environment))
                extra = [f"vllm_server_base_url={url}"]
            print(measure(name, Path(scratch) / name, options, extra), flush=True)
    return 0


def measure(name: str, root: Path, options: argparse.Namespace, extra: list[str]) -> str:
    """Train with one backend.

    Args:
        name: of `recipes/generation/`.
        root: for its run.
        options: of the command line.
        extra: further overrides.

    Returns:
        A row of the table; the first step, in which engines warm up, is left out of the seconds.
    """
    steps = [f"max_steps={options.steps}", f"save_steps={options.steps}", "evaluation.problems=0"]
    recipe = [f"generation={name}", f"output_root={root}"]
    with contextlib.redirect_stdout(sys.stderr):
        assert run.command("capo_aggressive", [*recipe, *steps, *extra, *options.overrides]) == 0, name
    lines = (root / "capo_aggressive" / "lab" / "seed0" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    seconds = [statistics.median(row[f"time/{what}"] for row in rows[1:]) for what in ("total", "generate")]
    found = [row[f"{DIFFERENCE}/mean"] for row in rows if f"{DIFFERENCE}/mean" in row]
    largest = max((row.get(f"{DIFFERENCE}/max", 0.0) for row in rows), default=0.0)
    compared = f"{statistics.mean(found):.1e} | {largest:.1e}" if found else "| "
    return f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {compared} |"


if __name__ == "__main__":
    sys.exit(main())
