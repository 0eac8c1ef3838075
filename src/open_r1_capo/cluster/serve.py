r"""Serve a policy for training, until interrupted (`make serve`).

    python -m open_r1_capo.cluster.serve --model lab --port 8000

Exit codes: those of vLLM; 2 where the input cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from open_r1_capo.cluster.vllm import gpu_memory, vllm_command, vllm_environment
from open_r1_capo.tasks.lab.policy import base_policy
from open_r1_capo.training.generation.backend import GenerationError
from open_r1_capo.training.generation.choice import vllm_python


def main(argv: list[str] | None = None) -> int:
    """Start the server in this process's place.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code, if it did not start.
    """
    parser = argparse.ArgumentParser(prog="make serve", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a folder, a hub id, or lab")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tp", type=int, help="GPUs that hold one copy of the model")
    parser.add_argument("--dp", type=int, help="copies of the model")
    options = parser.parse_args(argv)
    try:
        memory = gpu_memory()
        check(options, len(memory))
        python = vllm_python()
        command = serve_command(str(python), model_folder(options.model), options, memory)
    except GenerationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"serving {options.model} at http://{options.host}:{options.port}; ^C ends it", file=sys.stderr, flush=True)
    # the trainer sends weights through vLLM's development endpoints
    os.execve(python, command, {**vllm_environment(not memory), "VLLM_SERVER_DEV_MODE": "1"})
    return 1


def check(options: argparse.Namespace, gpus: int) -> None:
    """Refuse what vLLM would fail at after a minute of loading.

    Args:
        options: of the command line.
        gpus: that this machine has.

    Raises:
        GenerationError: the port is taken, or there are fewer GPUs than asked for.
    """
    tensor, copies = (1 if size is None else size for size in (options.tp, options.dp))
    if min(tensor, copies) < 1:
        raise GenerationError("TP and DP must be at least 1")
    if tensor * copies > max(1, gpus):
        raise GenerationError(f"TP × DP is {tensor * copies}, but this machine has {gpus} GPUs")
    if not 0 < options.port < 65536:
        raise GenerationError(f"PORT must be between 1 and 65535, got {options.port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise GenerationError(
                f"port {options.port} of {options.host} cannot be used ({error.strerror}): set PORT=<a free one>"
            ) from None


def model_folder(name: str) -> Path:
    """Where a model's files are; made or downloaded if they are not on this machine.

    Args:
        name: a folder, a hub id, or `lab`.

    Returns:
        The folder.

    Raises:
        GenerationError: there is no such model.
    """
    if name == "lab":
        return base_policy()
    if (Path(name) / "config.json").is_file():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise GenerationError(f"the model {name} cannot be loaded ({str(error).splitlines()[0]})") from None


def serve_command(python: str, model: Path, options: argparse.Namespace, memory: list[int]) -> list[str]:
    """The command of a server that takes weights while it runs.

    Args:
        python: interpreter of the environment that has vLLM.
        model: the policy's folder.
        options: of the command line.
        memory: bytes of each GPU; none for the CPU.

    Returns:
        The command.
    """
    command = vllm_command(python, model, options.port, memory, None)
    command[command.index("--host") + 1] = options.host
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    for flag, size in (("--tensor-parallel-size", options.tp), ("--data-parallel-size", options.dp)):
        if size and flag in command:
            command[command.index(flag) + 1] = str(size)
    return [*command, "--weight-transfer-config", json.dumps({"backend": "nccl"})] if memory else command


if __name__ == "__main__":
    sys.exit(main())
