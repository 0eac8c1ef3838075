r"""`make serve`: becomes a vLLM server of a policy on this machine, which takes a trainer's weights.

    python -m open_r1_capo.cluster.serve --model lab --port 8000

Exit codes: those of vLLM; 2 where the input cannot be used.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from open_r1_capo.cluster.vllm import (
    DEVELOPMENT,
    FOR_TRAINING,
    WEIGHTS_BY_NCCL,
    ServerError,
    gpu_memory,
    vllm_command,
    vllm_environment,
    vllm_python,
)
from open_r1_capo.runs.exit import run_cli
from open_r1_capo.tasks.source import policy_source


def main(argv: list[str] | None = None) -> int:
    """Start the server in this process's place; returns the exit code if it did not start."""
    parser = argparse.ArgumentParser(prog="make serve", description="Serve a policy for training, until interrupted.")
    parser.add_argument("--model", required=True, help="a folder, a hub id, or lab")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tp", type=int, help="GPUs that hold one copy of the model")
    parser.add_argument("--dp", type=int, help="copies of the model")
    options = parser.parse_args(argv)
    return run_cli(lambda: start(options))


def start(options: argparse.Namespace) -> None:
    """Replace this process by the server; raises ServerError if options or model cannot be used."""
    memory = gpu_memory()
    check(options, len(memory))
    python = vllm_python()
    model = model_folder(options.model)
    sizes = {"tensor_parallel_size": options.tp, "data_parallel_size": options.dp}
    changes = {"host": options.host, **FOR_TRAINING}
    if memory:
        changes |= WEIGHTS_BY_NCCL | {name: size for name, size in sizes.items() if size}
    command = vllm_command(str(python), model, options.port, memory, None, **changes)
    print(f"serving {options.model} at http://{options.host}:{options.port}; ^C ends it", file=sys.stderr, flush=True)
    os.execve(python, command, {**vllm_environment(not memory), **DEVELOPMENT})


def check(options: argparse.Namespace, gpus: int) -> None:
    """Refuse with a ServerError what vLLM would fail at after a minute of loading."""
    tensor, copies = (1 if size is None else size for size in (options.tp, options.dp))
    if min(tensor, copies) < 1:
        raise ServerError("TP and DP must be at least 1")
    if tensor * copies > max(1, gpus):
        raise ServerError(f"TP × DP is {tensor * copies}, but this machine has {gpus} GPUs")
    if not 0 < options.port < 65536:
        raise ServerError(f"PORT must be between 1 and 65535, got {options.port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise ServerError(
                f"port {options.port} of {options.host} cannot be used ({error.strerror}): set PORT=<a free one>"
            ) from None


def model_folder(name: str) -> Path:
    """The folder of a policy's files, made or downloaded if need be; raises ServerError for an unknown model."""
    folder = Path(policy_source(name).folder(name, None))
    if (folder / "config.json").is_file():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise ServerError(f"the model {name} cannot be loaded ({str(error).splitlines()[0]})") from None


if __name__ == "__main__":
    sys.exit(main())
