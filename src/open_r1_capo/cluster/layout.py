"""How a recipe is laid out on the nodes of a job: which of them train, which serve, and the command of each.

Pure functions of the options and the nodes: nothing is looked up, started or written here.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from open_r1_capo.cluster.job import Step
from open_r1_capo.runs.exit import UserError
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import DataConfig

PYTHON = ".venv/bin/python"
PORTS = 4  # of a job: rendezvous, server, weight transfer, the server's own nodes


class LaunchError(UserError, ValueError):
    """The options cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Place:
    """Where a job runs.

    Attributes:
        nodes: host names, in Slurm's order.
        addresses: their IP addresses, in the same order.
        gpus: on each node.
        cpus: of each node; None leaves them to Slurm.
        port: the first of `PORTS` free ones.
    """

    nodes: tuple[str, ...]
    addresses: tuple[str, ...]
    gpus: int
    cpus: int | None = None
    port: int = 20000

    def address(self, node: str) -> str:
        """Where a node is reached."""
        return self.addresses[self.nodes.index(node)]


def resolve(options: argparse.Namespace, place: Place, seed: int) -> list[Step]:
    """Turn options into the commands of a job.

    Args:
        options: of `parser`.
        place: the job's nodes.
        seed: of the run.

    Returns:
        The server's steps, one a node, and then the trainer's.

    Raises:
        LaunchError: the options contradict each other, or do not fit the nodes or the batch.
        ConfigError: the recipe or an override is not accepted.
    """
    chosen = [f"scale={options.scale}", f"seed={seed}"]
    chosen += [f"generation={options.generation}"] if options.generation else []
    try:
        overrides = [*chosen, *shlex.split(options.args)]
    except ValueError as error:
        raise LaunchError(f"--args cannot be split into words ({error}): {options.args}") from None
    settings = compose_recipe(options.recipe, overrides)
    if settings.get("use_cpu") and not options.accelerator:
        place = replace(place, nodes=place.nodes[:1], addresses=place.addresses[:1])
    training, serving, gpus = divide(options, place, settings)
    servers = server_steps(options, place, settings, serving, gpus)
    if options.serve:
        return servers
    if servers:
        url = f"http://{place.address(serving[0])}:{place.port + 1}"
        overrides += [f"vllm_server_base_url={url}", f"vllm_group_port={place.port + 2}"]
    elif settings.get("use_vllm") and options.tp > 1:
        overrides.append(f"vllm_tensor_parallel_size={options.tp}")
    return [*servers, trainer_step(options, place, settings, training, place.gpus - gpus, overrides)]


def divide(
    options: argparse.Namespace, place: Place, settings: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Share the job's nodes between the trainer and the server.

    Args:
        options: of `parser`.
        place: the job's nodes.
        settings: the composed recipe.

    Returns:
        The trainer's nodes, the server's, and how many GPUs of a shared node serve (0 if none is shared).

    Raises:
        LaunchError: there is nothing left for one of them, or no server is wanted.
    """
    if options.serve:
        return (), place.nodes, 0
    given = options.server_gpus or options.server_nodes
    if not needs_server(settings):
        if given or options.dp:
            name = "--server-gpus" if options.server_gpus else "--server-nodes" if options.server_nodes else "--dp"
            raise LaunchError(f"{name} has no effect here: it needs --generation vllm_server without a server's URL")
        return place.nodes, (), 0
    if options.server_nodes or (len(place.nodes) > 1 and not options.server_gpus):
        count = options.server_nodes or 1
        if count >= len(place.nodes):
            raise LaunchError(f"--server-nodes {count} leaves none of the {len(place.nodes)} nodes to train on")
        return place.nodes[:-count], place.nodes[-count:], 0
    if len(place.nodes) > 1:
        raise LaunchError("--server-gpus shares a single node: with several nodes use --server-nodes")
    count = options.server_gpus or 1
    if count >= place.gpus:
        raise LaunchError(f"--server-gpus {count} leaves none of the {place.gpus} GPUs to train on")
    return place.nodes, place.nodes, count


def needs_server(settings: Mapping[str, Any]) -> bool:
    """Whether the recipe generates on a server that is not running yet."""
    known = settings.get("vllm_server_base_url") or settings.get("vllm_server_host")
    return bool(settings.get("use_vllm") and settings.get("vllm_mode") == "server" and not known)


def server_steps(
    options: argparse.Namespace,
    place: Place,
    settings: Mapping[str, Any],
    nodes: tuple[str, ...],
    shared: int,
) -> list[Step]:
    """The steps of one vLLM server, whose copies of the model are spread over its nodes behind one URL.

    Args:
        options: of `parser`.
        place: the job's nodes.
        settings: the composed recipe.
        nodes: the server's; none for no server.
        shared: GPUs of a node that it shares with the trainer; 0 for whole nodes.

    Returns:
        One step a node, the one that answers requests first.

    Raises:
        LaunchError: the model's copies do not fill the GPUs.
    """
    gpus = shared or place.gpus
    copies, rest = divmod(len(nodes) * gpus, options.tp)
    if nodes and (gpus % options.tp or rest or options.dp not in (None, copies)):
        asked = f"--tp {options.tp}" + (f" --dp {options.dp}" if options.dp else "")
        raise LaunchError(
            f"{asked} does not fill the server's {len(nodes)} × {gpus} GPUs: tp × dp must be that number"
        )
    cpus = place.cpus and place.cpus * gpus // max(1, place.gpus)
    base = serve_command(settings, options.tp, copies, place.port + 1)
    steps = []
    for number, node in enumerate(nodes):
        command = list(base)
        if len(nodes) > 1:
            head = place.address(nodes[0])
            command += ["--data-parallel-size-local", str(gpus // options.tp), "--data-parallel-address", head]
            command += ["--data-parallel-rpc-port", str(place.port + 3)]
        if number:
            command += ["--headless", "--data-parallel-start-rank", str(number * gpus // options.tp)]
        name = "server" if number == 0 else f"server{number + 1}"
        # the trainer sends new weights through vLLM's development endpoints
        steps.append(Step(name, (node,), gpus, cpus, tuple(command), {"VLLM_SERVER_DEV_MODE": "1"}))
    return steps


def serve_command(settings: Mapping[str, Any], tensor: int, copies: int, port: int) -> list[str]:
    """The command of a vLLM server that TRL's trainer can send weights to.

    Args:
        settings: the composed recipe.
        tensor: GPUs that hold one copy of the model.
        copies: of the model.
        port: to listen on.

    Returns:
        The command.
    """
    command = [PYTHON, "-m", "vllm.entrypoints.cli.main", "serve", str(settings["model_name_or_path"])]
    command += ["--host", "0.0.0.0", "--port", str(port)]
    command += ["--tensor-parallel-size", str(tensor), "--data-parallel-size", str(copies)]
    prompt = settings.get("data", {}).get("max_prompt_tokens", DataConfig.max_prompt_tokens)
    longest = settings.get("vllm_max_model_length") or (prompt and prompt + settings["max_completion_length"])
    command += ["--max-model-len", str(longest)] if longest else []
    # the model's own sampling defaults stay out, and log-probabilities are those that tokens were drawn from
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    return [*command, "--weight-transfer-config", '{"backend": "nccl"}']


def trainer_step(
    options: argparse.Namespace,
    place: Place,
    settings: Mapping[str, Any],
    nodes: tuple[str, ...],
    gpus: int,
    overrides: Sequence[str],
) -> Step:
    """The trainer's step: `accelerate launch` on each of its nodes.

    Args:
        options: of `parser`.
        place: the job's nodes.
        settings: the composed recipe.
        nodes: the trainer's.
        gpus: of each node, one process each.
        overrides: of the recipe.

    Returns:
        The step.

    Raises:
        LaunchError: there is no GPU, or the processes cannot share the batch.
    """
    on_cpu = bool(settings.get("use_cpu"))
    plain = on_cpu and not options.accelerator
    if not plain and gpus < 1:
        raise LaunchError("the job has no GPUs: give sbatch --gres=gpu:<number>")
    processes = 1 if plain else len(nodes) * gpus
    overrides = [*overrides, *batch_overrides(settings, processes)]
    if plain:
        command = ["--cpu", "--num_machines", "1", "--num_processes", "1", "--dynamo_backend", "no"]
    else:
        config = f"recipes/accelerate_configs/{options.accelerator or 'zero2'}.yaml"
        command = ["--config_file", config, "--num_machines", str(len(nodes)), "--num_processes", str(processes)]
        command += [
            "--main_process_ip",
            place.address(nodes[0]),
            "--main_process_port",
            str(place.port),
            "--rdzv_backend",
            "static",
        ]
    command += ["--mixed_precision", "bf16" if settings.get("bf16") else "no"]
    script = ["src/open_r1_capo/grpo.py", "--config-name", options.recipe, *overrides]
    cpus = place.cpus and (place.cpus * gpus // place.gpus if place.gpus else place.cpus)
    words = (PYTHON, "-m", "open_r1_capo.cluster.node", *command, *script)
    return Step("trainer", nodes, 0 if plain else gpus, cpus, words)


def batch_overrides(settings: Mapping[str, Any], processes: int) -> list[str]:
    """Make the scale's micro-batch, which is made for four GPUs, divide the batch of any number of processes.

    Args:
        settings: the composed recipe.
        processes: of the training.

    Returns:
        An override with the largest micro-batch that divides the batch and is no larger than the scale's; nothing
        where the scale's own does, or sets none.

    Raises:
        LaunchError: the batch cannot be shared equally.
    """
    batch, micro = settings["completions_per_step"], settings.get("per_device_train_batch_size")
    share, rest = divmod(batch, processes)
    if rest or not share:
        raise LaunchError(
            f"completions_per_step ({batch}) is not a multiple of the {processes} training processes: choose a number "
            "of GPUs that divides it"
        )
    if micro is None or share % micro == 0:
        return []
    largest = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
    return [f"per_device_train_batch_size={largest}"]
