"""The vLLM server of an evaluation: the package's own, whose mistakes are the evaluation's."""

from open_r1_capo.cluster.vllm import ServerError as EvalError
from open_r1_capo.cluster.vllm import (
    die_with_parent,
    failure,
    free_port,
    gpu_memory,
    serve,
    tail,
    vllm_command,
    vllm_environment,
)

__all__ = [
    "EvalError",
    "die_with_parent",
    "failure",
    "free_port",
    "gpu_memory",
    "serve",
    "tail",
    "vllm_command",
    "vllm_environment",
]
