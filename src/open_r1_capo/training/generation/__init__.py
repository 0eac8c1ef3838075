"""Who samples the completions: `generation=transformers`, `vllm_colocate` or `vllm_server` (docs/generation.md).

On GPUs TRL's own vLLM classes generate. They send weights by CUDA, so on CPUs two of ours take their place behind one
interface, `Backend`: `VLLMServers` (HTTP) and `VLLMChild` (a vLLM engine in a child process). `CPUGeneration` is what
TRL's trainer sees of either.
"""
