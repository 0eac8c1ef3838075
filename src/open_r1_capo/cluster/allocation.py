"""Shares a job's nodes and GPUs between trainer and vLLM server, and writes the srun step of each.

Pure functions of the options and the nodes: nothing is looked up, started or written here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from open_r1_capo.cluster.job import SrunStep
from open_r1_capo.cluster.vllm import COMMAND_LINE, DEVELOPMENT, FOR_TRAINING, WEIGHTS_BY_NCCL, serve_command
from open_r1_capo.runs.exit import UserError
from open_r1_capo.settings.batch import MICRO, largest_micro_batch
from open_r1_capo.settings.budget import default_accelerator
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import DataConfig

PYTHON = ".venv/bin/python"
PORTS = 4  # of a job: rendezvous, server, weight transfer, the server's own nodes


class LaunchError(UserError, ValueError):
    """Options that cannot be used."""


@dataclass(frozen=True)
class LaunchOptions:
    """What slurm/train.slurm is asked for; its `--help` explains each."""

    recipe: str
    scale: str
    accelerator: str | None = None
    generation: str | None = None
    server_gpus: int | None = None
    server_nodes: int | None = None
    tp: int = 1
    dp: int | None = None
    args: str = ""
    serve: bool = False


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job."""

    nodes: tuple[str, ...]  # host names, in Slurm's order
    addresses: tuple[str, ...]  # their IP addresses, in the same order
    gpus: int  # on each node
    cpus: int | None = None  # of each node; None leaves them to Slurm
    port: int = 20000  # the first of `PORTS` free ones

    def address(self, node: str) -> str:
        """A node's IP address."""
        return self.addresses[self.nodes.index(node)]

    def cpus_beside(self, gpus: int) -> int | None:
        """The share of a node's CPUs that goes with this many of its GPUs."""
        return self.cpus and (self.cpus * gpus // self.gpus if self.gpus else self.cpus)


@dataclass(frozen=True)
class Share:
    """Some nodes of an allocation, and a number of GPUs on each of them."""

    nodes: tuple[str, ...] = ()
    gpus: int = 0


def resolve(options: LaunchOptions, allocation: Allocation, seed: int) -> list[SrunStep]:
    """The steps of a job, the server's and then the trainer's; raises LaunchError if the options do not fit."""
    overrides = [f"scale={options.scale}", f"seed={seed}"]
    overrides += [f"generation={options.generation}"] if options.generation else []
    try:
        overrides += shlex.split(options.args)
    except ValueError as error:
        raise LaunchError(f"--args cannot be split into words ({error}): {options.args}") from None
    settings = compose_recipe(options.recipe, overrides)
    if settings.get("use_cpu") and not options.accelerator:
        allocation = replace(allocation, nodes=allocation.nodes[:1], addresses=allocation.addresses[:1])
    training, serving = divide(options, allocation, settings)
    servers = server_steps(options, allocation, settings, serving)
    if options.serve:
        return servers
    if servers:
        url = f"http://{allocation.address(serving.nodes[0])}:{allocation.port + 1}"
        overrides += [f"vllm_server_base_url={url}", f"vllm_group_port={allocation.port + 2}"]
    elif settings.get("use_vllm") and options.tp > 1:
        overrides.append(f"vllm_tensor_parallel_size={options.tp}")
    return [*servers, trainer_step(options, allocation, settings, training, overrides)]


def divide(options: LaunchOptions, allocation: Allocation, settings: Mapping[str, Any]) -> tuple[Share, Share]:
    """The trainer's and the server's shares, of which one may be empty; raises LaunchError if none is left for one."""
    nodes, gpus = allocation.nodes, allocation.gpus
    if options.serve:
        return Share(), Share(nodes, gpus)
    if not needs_server(settings):
        for flag in ("server_gpus", "server_nodes", "dp"):
            if getattr(options, flag):
                raise LaunchError(
                    f"--{flag.replace('_', '-')} has no effect here: it needs --generation vllm_server without a "
                    "server's URL"
                )
        return Share(nodes, gpus), Share()
    if options.server_nodes or (len(nodes) > 1 and not options.server_gpus):
        count = options.server_nodes or 1
        if count >= len(nodes):
            raise LaunchError(f"--server-nodes {count} leaves none of the {len(nodes)} nodes to train on")
        return Share(nodes[:-count], gpus), Share(nodes[-count:], gpus)
    if len(nodes) > 1:
        raise LaunchError("--server-gpus shares a single node: with several nodes use --server-nodes")
    count = options.server_gpus or 1
    if count >= gpus:
        raise LaunchError(f"--server-gpus {count} leaves none of the {gpus} GPUs to train on")
    return Share(nodes, gpus - count), Share(nodes, count)


def needs_server(settings: Mapping[str, Any]) -> bool:
    """Whether the recipe generates on a server that is not running yet."""
    known = settings.get("vllm_server_base_url") or settings.get("vllm_server_host")
    return bool(settings.get("use_vllm") and settings.get("vllm_mode") == "server" and not known)


def server_steps(
    options: LaunchOptions, allocation: Allocation, settings: Mapping[str, Any], share: Share
) -> list[SrunStep]:
    """The steps of one vLLM server behind one URL, one a node, the one that answers requests first.

    Raises:
        LaunchError: the model's copies do not fill the GPUs.
    """
    nodes, gpus = share.nodes, share.gpus
    copies, rest = divmod(len(nodes) * gpus, options.tp)
    if nodes and (gpus % options.tp or rest or options.dp not in (None, copies)):
        asked = f"--tp {options.tp}" + (f" --dp {options.dp}" if options.dp else "")
        raise LaunchError(
            f"{asked} does not fill the server's {len(nodes)} × {gpus} GPUs: tp × dp must be that number"
        )
    steps = []
    for number, node in enumerate(nodes):
        spread: dict[str, Any] = {}
        if len(nodes) > 1:
            spread = {"data_parallel_size_local": gpus // options.tp}
            spread |= {"data_parallel_address": allocation.address(nodes[0])}
            spread |= {"data_parallel_rpc_port": allocation.port + 3}
        if number:
            spread |= {"headless": True, "data_parallel_start_rank": number * gpus // options.tp}
        command = serve_command(
            PYTHON,
            COMMAND_LINE,
            str(settings["model_name_or_path"]),
            host="0.0.0.0",
            port=allocation.port + 1,
            tensor_parallel_size=options.tp,
            data_parallel_size=copies,
            max_model_len=_longest(settings),
            generation_config="vllm",  # the model's own sampling defaults stay out
            **FOR_TRAINING,
            **WEIGHTS_BY_NCCL,
            **spread,
        )
        name = "server" if number == 0 else f"server{number + 1}"
        steps.append(SrunStep(name, (node,), gpus, allocation.cpus_beside(gpus), tuple(command), DEVELOPMENT))
    return steps


def _longest(settings: Mapping[str, Any]) -> int | None:
    """Tokens of the longest sequence; None leaves it to the model."""
    prompt = settings.get("data", {}).get("max_prompt_tokens", DataConfig.max_prompt_tokens)
    return settings.get("vllm_max_model_length") or (prompt and prompt + settings["max_completion_length"])


def trainer_step(
    options: LaunchOptions, allocation: Allocation, settings: Mapping[str, Any], share: Share, overrides: Sequence[str]
) -> SrunStep:
    """The trainer's step: `accelerate launch` on each of its nodes, one process a GPU; LaunchError without GPUs."""
    plain = bool(settings.get("use_cpu")) and not options.accelerator
    if not plain and share.gpus < 1:
        raise LaunchError("the job has no GPUs: give sbatch --gres=gpu:<number>")
    processes = 1 if plain else len(share.nodes) * share.gpus
    given = settings.get(MICRO)  # of four GPUs, where the scale sets it
    fitting = largest_micro_batch(settings["completions_per_step"], processes, limit=given or 1)
    more = [f"{MICRO}={fitting}"] if given and fitting != given else []
    if plain:
        command = ["--cpu", "--num_machines", "1", "--num_processes", "1", "--dynamo_backend", "no"]
    else:
        config = f"recipes/accelerate_configs/{options.accelerator or default_accelerator(settings)}.yaml"
        command = ["--config_file", config, "--num_machines", str(len(share.nodes)), "--num_processes", str(processes)]
        command += ["--main_process_ip", allocation.address(share.nodes[0])]
        command += ["--main_process_port", str(allocation.port), "--rdzv_backend", "static"]
    command += ["--mixed_precision", "bf16" if settings.get("bf16") else "no"]
    script = ["src/open_r1_capo/grpo.py", "--config-name", options.recipe, *overrides, *more]
    words = (PYTHON, "-m", "open_r1_capo.cluster.node", *command, *script)
    return SrunStep("trainer", share.nodes, 0 if plain else share.gpus, allocation.cpus_beside(share.gpus), words)
