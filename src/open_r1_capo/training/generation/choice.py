"""Which backend a recipe means on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from trl import GRPOConfig

from open_r1_capo.cluster.vllm import cpu_arguments, vllm_python
from open_r1_capo.training.generation.backend import Backend, GenerationError
from open_r1_capo.training.generation.colocate import WORKER, VLLMChild
from open_r1_capo.training.generation.server import VLLMServers


def backend_for(args: GRPOConfig, model: str, run: Path) -> Backend | None:
    """The backend of a run, not started; None where TRL generates by itself: with transformers, and on GPUs.

    Raises:
        GenerationError: a server's address cannot be used.
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
    """The addresses in `vllm_server_base_url`, separated by commas; raises GenerationError if one is none."""
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


def engine_arguments(args: GRPOConfig, model: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a policy on the CPU."""
    config = Path(model) / "config.json"
    own = json.loads(config.read_text()).get("max_position_embeddings") if config.is_file() else None
    longest = args.vllm_max_model_length or own
    return {
        "model": model,
        "dtype": "bfloat16" if args.bf16 else "float32",
        "max_model_len": longest,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "generation_config": "vllm",  # the model's own sampling defaults stay out
        "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from
        "seed": 0,
        **cpu_arguments(longest),
    }
