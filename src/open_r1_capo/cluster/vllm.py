"""A vLLM server, its command and its environment; `serve` runs it for a `with` block and ends it whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
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

from open_r1_capo.runs.exit import UserError

STARTUP = 1800.0  # seconds; large weights from a network disk take minutes
GRACE = 20.0  # seconds between the polite signals and the last one
LOG_LINES = 15  # shown when the server does not come up

OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|No available memory for the cache|less than desired|MemoryError|Cannot allocate",
    re.IGNORECASE,
)


class ServerError(UserError, RuntimeError):
    """A model server cannot be used; the message is for the user."""


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
    return (
        memory if visible is None or done.returncode else memory[: len([i for i in visible.split(",") if i.strip()])]
    )


def parallelism(memory: Sequence[int], weights: int, heads: int) -> tuple[int, int]:
    """Spread a model over GPUs: as few as hold it for one copy, as many copies as fit.

    Args:
        memory: Bytes of each GPU.
        weights: Bytes of the model's weights.
        heads: Number of attention heads, which the tensor parallel size must divide.

    Returns:
        Tensor parallel and data parallel size.
    """
    gpus = max(1, len(memory))
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0 and heads % size == 0]
    # 0.6: the rest is for the cache of keys and values, without which throughput is poor
    tensor = next((size for size in sizes if memory and weights < 0.6 * size * min(memory)), sizes[-1])
    return (tensor, gpus // tensor) if memory else (1, 1)


def vllm_command(python: str, model: Path, port: int, memory: Sequence[int], max_length: int | None) -> list[str]:
    """Write the command that serves a model as `policy`.

    Args:
        python: Interpreter of the environment that has vLLM.
        model: Folder of the model.
        port: TCP port to listen on.
        memory: Bytes of each GPU; none for the CPU.
        max_length: Longest sequence in tokens, or None for the model's own.

    Returns:
        The command.
    """
    config = json.loads((model / "config.json").read_text())
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    tensor, data = parallelism(memory, weights, config.get("num_attention_heads") or 1)
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        "policy",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--seed", "0"]
    # a model's own generation_config may set top-k and penalties; only its end-of-text tokens shall count
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0}
    command += ["--override-generation-config", json.dumps(neutral)]
    if max_length:
        command += ["--max-model-len", str(max_length)]
    if memory:
        return [*command, "--tensor-parallel-size", str(tensor), "--data-parallel-size", str(data)]
    # `auto` would turn float32 into bfloat16; compiling takes longer than a CPU-sized evaluation
    dtype = "float32" if config.get("dtype", config.get("torch_dtype")) in (None, "float32") else "auto"
    # a seeded request whose prompt is split over two steps crashes the CPU engine (it rewinds its random generator)
    whole = str(max(8192, max_length or config.get("max_position_embeddings") or 0))
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", whole]
    return [*command, "--dtype", dtype, "--enforce-eager"]


def vllm_environment(on_cpu: bool) -> dict[str, str]:
    """Return the environment variables that vLLM needs.

    Args:
        on_cpu: Whether it runs on the CPU.

    Returns:
        This process's environment and the variables.
    """
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # one process instead of three starts in a sixth of the time; the default share of the memory fails on a CPU
    cpu = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    return os.environ | quiet | (cpu if on_cpu else {})


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies, even by SIGKILL (Linux only); for `preexec_fn`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def answers(url: str) -> bool:
    """Whether an address answers 200 within five seconds."""
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(url, timeout=5) as response:
            return response.status == 200
    except OSError:  # URLError is one
        return False


def tail(log: Path, lines: int = LOG_LINES) -> str:
    """Return the last lines of a log.

    Args:
        log: The file.
        lines: How many.

    Returns:
        The lines, joined.
    """
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"


def failure(log: Path, what: str) -> ServerError:
    """Describe why the server is not there.

    Args:
        log: The server's log.
        what: What was seen of it.

    Returns:
        The error, with the first exception and the last lines of the log.
    """
    text = log.read_text(errors="replace") if log.exists() else ""
    hint = ""
    if OUT_OF_MEMORY.search(text):
        hint = " for lack of memory (a smaller MAX_TOKENS, or more GPUs, or VLLM_CPU_KVCACHE_SPACE in GiB on a CPU)"
    # vLLM ends with "see root cause above", hundreds of lines above
    cause = re.search(r"\b((?:\w+\.)*\w+(?:Error|Exception): .+)", text[max(0, text.find("Traceback")) :])
    first = f" ({cause[1].strip()})" if cause else ""
    return ServerError(f"the model server {what}{hint}{first}; the end of {log}:\n{tail(log)}")


def stop(process: subprocess.Popen) -> None:
    """End a process and every process it started.

    Args:
        process: A process that leads its own session.
    """
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
    """Run a server for the time of a `with` block.

    Args:
        command: The command that starts it.
        url: Address that answers 200 when it is ready.
        log: File for its output.
        environment: Its environment variables.
        startup: Seconds it may take.

    Yields:
        The process.

    Raises:
        ServerError: If it does not come up.
    """
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
