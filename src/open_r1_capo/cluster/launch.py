"""slurm/train.slurm's command line: submits a job, and within it runs the trainer's and the server's steps.

    python -m open_r1_capo.cluster.launch --recipe capo_aggressive --scale qwen2.5-math-7b --nodes 2 --dry-run

Exit codes: those of the training; 2 where the options cannot be used, before a node is taken.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields

from open_r1_capo.cluster.allocation import PORTS, Allocation, LaunchError, LaunchOptions, resolve
from open_r1_capo.cluster.job import LOGS, run_job
from open_r1_capo.runs.exit import positive, run_cli
from open_r1_capo.settings.recipes import RECIPES, known_recipes

ACCELERATORS = tuple(sorted(path.stem for path in (RECIPES / "accelerate_configs").glob("*.yaml")))
GENERATIONS = tuple(sorted(path.stem for path in (RECIPES / "generation").glob("*.yaml")))
GPUS_PER_NODE = 4  # where neither Slurm nor an option says it
TRAIN_SCRIPT, SERVE_SCRIPT = "slurm/train.slurm", "slurm/serve.slurm"


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> None:
        """Raise LaunchError instead of printing the usage."""
        raise LaunchError(f"{message} (--help lists the options)")


def parser() -> Parser:
    """The options of slurm/train.slurm: those of `LaunchOptions` and of the job."""
    one = Parser(prog="slurm/train.slurm", description="Train a recipe by Slurm: submits itself, or runs in its job.")
    one.add_argument("--recipe", default="capo_aggressive", metavar="NAME", help=f"of {', '.join(known_recipes())}")
    one.add_argument("--scale", default="qwen2.5-math-7b", metavar="NAME", help="of recipes/scale/")
    one.add_argument("--seed", default=None, help="a number; or, to submit an array of jobs, such as 0-4 (default 0)")
    one.add_argument(
        "--accelerator",
        choices=ACCELERATORS,
        help="by default zero2, fsdp with a KL budget; on CPUs one plain process",
    )
    one.add_argument("--generation", choices=GENERATIONS, help="by default the scale's")
    one.add_argument("--nodes", type=positive, help="by default the job's; 1 when submitting")
    one.add_argument("--gpus-per-node", type=positive, help=f"by default the job's; {GPUS_PER_NODE} when submitting")
    servers = one.add_mutually_exclusive_group()
    servers.add_argument("--server-gpus", type=positive, help="GPUs of a single node that serve (default 1)")
    servers.add_argument("--server-nodes", type=positive, help="nodes, the last ones, that serve (default 1)")
    one.add_argument("--tp", type=positive, default=1, help="GPUs that hold one copy of the served model (default 1)")
    one.add_argument("--dp", type=positive, help="copies of it; by default as many as fit the server's GPUs")
    one.add_argument("--args", default="", metavar='"KEY=VALUE …"', help="overrides of the recipe")
    one.add_argument("--serve", action="store_true", help="run the server alone, on all of the job's GPUs")
    one.add_argument(
        "--wait", action="store_true", help="when submitting: return when the job ends, with its exit code"
    )
    one.add_argument("--dry-run", action="store_true", help="print the resolved commands")
    return one


def main(argv: Sequence[str] | None = None) -> int:
    """Resolve the options, and print, submit or run what they say; returns the exit code."""
    return run_cli(lambda: command(list(sys.argv[1:] if argv is None else argv)))


def command(argv: list[str]) -> int:
    """Like `main`, but raises LaunchError."""
    asked = parser().parse_args(argv)
    job = os.environ.get("SLURM_JOB_ID")
    seed = seed_of(asked.seed, os.environ)
    allocation = slurm_allocation(asked, os.environ) if job else assumed_allocation(asked)
    options = LaunchOptions(**{one.name: getattr(asked, one.name) for one in fields(LaunchOptions)})
    steps = resolve(options, allocation, seed)
    submit = submission(asked, argv, allocation.gpus if any(step.gpus for step in steps) else 0)
    if asked.dry_run:
        print("\n".join([*([] if job else [shlex.join(submit)]), *(step.line() for step in steps)]))
        return 0
    if not job:
        return _submit(submit)
    os.environ.setdefault("WANDB_MODE", "offline")  # compute nodes seldom reach the network; site.sh may say so
    return run_job(steps, int(job))


def seed_of(wanted: str | None, environ: Mapping[str, str]) -> int:
    """The run's seed: an array job's task number, else `--seed` (the first of `0-4`); LaunchError for other text."""
    task, inside = environ.get("SLURM_ARRAY_TASK_ID"), "SLURM_JOB_ID" in environ
    if task and (wanted or "").isdecimal():
        raise LaunchError(f"the seed of an array's job is its number, {task}: leave --seed {wanted} out")
    if task:
        return int(task)
    array = r"\d+" if inside else r"\d+(-\d+)?(,\d+(-\d+)?)*"
    if not re.fullmatch(array, wanted or "0"):
        raise LaunchError(f"--seed must be a number, or when submitting an array such as 0-4, got {wanted!r}")
    return int(re.split("[-,]", wanted or "0")[0])


def slurm_allocation(asked: argparse.Namespace, environ: Mapping[str, str]) -> Allocation:
    """The running job's nodes and GPUs, as many as asked for, by default all; LaunchError if it has fewer."""
    listed = subprocess.check_output(["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]], text=True)
    nodes, gpus = listed.split(), int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    for what, wanted, there in (("nodes", asked.nodes, len(nodes)), ("gpus-per-node", asked.gpus_per_node, gpus)):
        if wanted and wanted > there:
            raise LaunchError(f"--{what} {wanted} is more than the job's {there}: give sbatch --nodes and --gres too")
    nodes = tuple(nodes[: asked.nodes])
    cpus = environ.get("SLURM_CPUS_ON_NODE")
    port = free_ports(20000 + int(environ["SLURM_JOB_ID"]) % 1200 * 10)
    addresses = tuple(address(node) for node in nodes)
    return Allocation(nodes, addresses, asked.gpus_per_node or gpus, int(cpus) if cpus else None, port)


def assumed_allocation(asked: argparse.Namespace) -> Allocation:
    """The nodes that a job will have, by made-up names."""
    nodes = tuple(f"node{number + 1}" for number in range(asked.nodes or 1))
    return Allocation(nodes, nodes, asked.gpus_per_node or GPUS_PER_NODE)


def address(node: str) -> str:
    """A node's IP address, or its name in Slurm's configuration where that cannot be looked up."""
    told = subprocess.run(["scontrol", "--oneliner", "show", "node", node], capture_output=True, text=True).stdout
    match = re.search(r"\bNodeAddr=(\S+)", told)
    name = match[1] if match else node
    try:
        return socket.gethostbyname(name)
    except OSError:
        return name


def free_ports(first: int) -> int:
    """The first of `PORTS` free ports in a row of this machine, from `first` on; LaunchError if there are none."""
    for start in range(first, first + 1000, PORTS):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(start, start + PORTS):
                stack.enter_context(socket.socket()).bind(("", port))
            return start
    raise LaunchError(f"no {PORTS} free ports in a row from {first} to {first + 1000} on this node")


def submission(asked: argparse.Namespace, argv: Sequence[str], gpus: int) -> list[str]:
    """The sbatch command with so many GPUs a node; partition and account come from slurm/site.sh."""
    words = ["sbatch", f"--nodes={asked.nodes or 1}", f"--gres=gpu:{gpus}" if gpus else "--gres=none"]
    words += ["--job-name", f"{asked.recipe}-{asked.scale}"]
    words += [f"--array={asked.seed}"] if asked.seed and not asked.seed.isdecimal() else []
    words += ["--wait"] if asked.wait else []
    script = SERVE_SCRIPT if asked.serve else TRAIN_SCRIPT
    return [*words, script, *(word for word in argv if word not in ("--dry-run", "--serve", "--wait"))]


def _submit(command: Sequence[str]) -> int:
    if shutil.which("sbatch") is None:
        raise LaunchError("there is no sbatch on this machine: make train runs here, --dry-run prints the commands")
    LOGS.mkdir(parents=True, exist_ok=True)  # Slurm drops a job whose log it cannot write
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
