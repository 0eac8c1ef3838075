"""Which backend a recipe means on this machine."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from trl import GRPOConfig

from open_r1_capo.training.generation.backend import Backend, GenerationError
from open_r1_capo.training.generation.colocate import WORKER, VLLMChild
from open_r1_capo.training.generation.server import VLLMServers

VLLM_PYTHON = Path(__file__).resolve().parents[4] / ".venv-vllm" / "bin" / "python"


def backend_for(args: GRPOConfig, model: str, run: Path) -> Backend | None:
    """Choose the backend of a run.

    Args:
        args: TRL's settings; `use_vllm`, `vllm_mode` and `vllm_server_*` decide.
        model: folder or hub id of the policy.
        run: the run's folder, for the engine's log.

    Returns:
        The backend, not started; None where TRL generates by itself: with transformers, and with vLLM on GPUs.

    Raises:
        GenerationError: there is no vLLM on this machine, or a server's address cannot be used.
    """
    if not args.use_vllm:
        return None
    addresses = server_urls(args) if args.vllm_mode == "server" else []
    if not args.use_cpu and torch.cuda.is_available():
        if len(addresses) > 1:
            raise GenerationError(
                "on GPUs weights are sent to one vLLM server: give vllm_server_base_url one address, and start that "
                "server with DP= for several copies of the model"
            )
        return None
    if args.vllm_mode == "server":
        return VLLMServers(addresses, model, args.vllm_server_timeout)
    log = run / f"vllm{args.process_index}.log"
    return VLLMChild([str(vllm_python()), str(WORKER)], engine_arguments(args, model), log)


def server_urls(args: GRPOConfig) -> list[str]:
    """The servers' addresses.

    Args:
        args: TRL's settings; `vllm_server_base_url` may hold several addresses, separated by commas.

    Returns:
        One URL for each.

    Raises:
        GenerationError: one is not an address.
    """
    # TRL's default host, 0.0.0.0, is an address to listen at
    host = "127.0.0.1" if args.vllm_server_host == "0.0.0.0" else args.vllm_server_host
    text = args.vllm_server_base_url or f"http://{host}:{args.vllm_server_port}"
    urls = [url.strip() for url in text.split(",")]
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GenerationError(
                f"vllm_server_base_url must be addresses such as http://127.0.0.1:8000 (a comma between), got {url!r}"
            )
    return urls


def vllm_python() -> Path:
    """The interpreter of the environment that has vLLM.

    Returns:
        This one, or that of `.venv-vllm`.

    Raises:
        GenerationError: neither has it.
    """
    if importlib.util.find_spec("vllm"):
        return Path(sys.executable)
    if not (VLLM_PYTHON.parents[1] / ".ready").is_file():
        raise GenerationError(
            "there is no vLLM in .venv-vllm: make serve installs it, and generation=transformers does without"
        )
    return VLLM_PYTHON


def engine_arguments(args: GRPOConfig, model: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a policy on the CPU.

    Args:
        args: TRL's settings.
        model: folder or hub id of the policy.

    Returns:
        The arguments.
    """
    config = Path(model) / "config.json"
    own = json.loads(config.read_text()).get("max_position_embeddings") if config.is_file() else None
    return {
        "model": model,
        "dtype": "bfloat16" if args.bf16 else "float32",
        "max_model_len": args.vllm_max_model_length or own,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "generation_config": "vllm",  # the model's own sampling defaults stay out
        "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from
        "enforce_eager": True,  # compiling takes longer than it saves at this size
        # a seeded request whose prompt is split over two steps crashes the CPU engine
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, args.vllm_max_model_length or own or 0),
        "seed": 0,
    }
