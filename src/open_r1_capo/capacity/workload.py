"""Workloads: a recipe's settings as the numbers that the memory formulas need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from open_r1_capo.capacity import CapacityError
from open_r1_capo.capacity.shapes import ModelShape, find_shape
from open_r1_capo.settings.batch import ACCUMULATION, MICRO, largest_micro_batch
from open_r1_capo.settings.run import read as read_settings
from open_r1_capo.tasks.source import problem_source

ACCELERATORS = ("zero2", "zero3", "ddp", "fsdp")
ROWS_SEEN = (2048, 5000)  # tokens and their distinct support ids in the benchmark of the curvature engine


@dataclass(frozen=True)
class Workload:
    """One recipe on so many GPUs."""

    title: str  # recipe and scale
    shape: ModelShape
    nodes: int
    ranks: int  # processes that train, one a GPU
    servers: int  # GPUs that only generate
    micro_batch: int  # sequences of one forward pass of a rank
    accumulation: int  # forward passes of an optimizer step
    prompt_limit: int  # tokens
    completion_limit: int  # tokens
    checkpointing: bool  # activations are computed again in the backward pass
    accelerator: str  # one of `ACCELERATORS`
    generation: str  # transformers, vllm_colocate or vllm_server
    tensor_parallel: int  # GPUs that a vLLM engine spans
    engine_share: float  # of a GPU's memory, for a vLLM engine beside the trainer
    sleeps: bool  # that engine leaves the memory while the policy trains
    element: int  # bytes of a weight in the forward pass: 2 in bfloat16, 4 in float32
    rollouts: int  # sequences that a rank generates at once
    capo: bool  # CAPO judges tokens (any mode but off)
    adam: bool  # CAPO's optimizer model has moments
    support: int  # K, ids of a token's support
    steps: int  # optimizer steps of a run
    save_every: int  # steps between two checkpoints

    @property
    def sequences(self) -> int:
        """Completions of one rank and optimizer step."""
        return self.micro_batch * self.accumulation

    @property
    def completions(self) -> int:
        """Completions of an optimizer step over all ranks."""
        return self.sequences * self.ranks

    @property
    def gpus(self) -> int:
        """GPUs in use, servers included."""
        return self.ranks + self.servers

    @property
    def checkpoints(self) -> int:
        """How many a run writes."""
        return self.steps // self.save_every

    @property
    def rows(self) -> int:
        """Distinct vocabulary rows that one step's supports touch, estimated: they grow as the root of the tokens.

        Heaps' law with exponent ½, through the 5000 rows of 2048 tokens in the benchmark; at most V.
        """
        tokens, rows = ROWS_SEEN
        return min(self.shape.vocabulary, round(rows * (self.completions * self.completion_limit / tokens) ** 0.5))

    def with_micro_batch(self, size: int) -> Workload:
        """The same completions in micro-batches of another size, which must divide those of a rank."""
        return replace(self, micro_batch=size, accumulation=self.sequences // size)

    def on(self, ranks: int, **changes: Any) -> Workload:
        """The same completions on so many ranks, each in one micro-batch; `ranks` must divide the completions."""
        mine = self.completions // ranks
        rollouts = mine * self.rollouts // self.sequences
        return replace(self, ranks=ranks, micro_batch=mine, accumulation=1, rollouts=rollouts, **changes)


@dataclass(frozen=True)
class Machines:
    """The GPUs that are asked for."""

    gpus: int = 4  # of each node
    nodes: int = 1
    accelerator: str = "zero2"  # of `ACCELERATORS`; with one GPU or on the CPU nothing is sharded
    server_gpus: int | None = None  # that only generate, under vllm_server; None is one, or the last node of several
    cpu: bool = False  # the trainer runs on the CPU


def read(settings: dict[str, Any], machines: Machines) -> Workload:
    """Turn a composed recipe into the numbers that the formulas need.

    Raises:
        CapacityError: a model of unknown shape, or machines that cannot be used.
    """
    if machines.accelerator not in ACCELERATORS:
        raise CapacityError(f"ACCELERATOR must be one of {', '.join(ACCELERATORS)}, got {machines.accelerator!r}")
    mode = settings.get("vllm_mode", "colocate")  # TRL's default
    generation = f"vllm_{mode}" if settings.get("use_vllm") else "transformers"
    ranks, servers = _split_gpus(machines, generation)
    _check_micro_batch(settings, ranks)
    run, trl = read_settings(settings, ranks)
    shape = find_shape(run.model_name_or_path, run.policy_settings)
    prompts = problem_source(run.data.name, run.data.path)
    return Workload(
        title=f"{run.recipe} on {run.scale}",
        shape=shape,
        nodes=machines.nodes,
        ranks=ranks,
        servers=servers,
        micro_batch=trl[MICRO],
        accumulation=trl[ACCUMULATION],
        prompt_limit=prompts.longest_prompt or run.data.max_prompt_tokens or 512,
        completion_limit=trl["max_completion_length"],
        checkpointing=trl["gradient_checkpointing"],
        accelerator=machines.accelerator,
        generation=generation,
        tensor_parallel=trl["vllm_tensor_parallel_size"],
        engine_share=trl["vllm_gpu_memory_utilization"],
        sleeps=trl["vllm_enable_sleep_mode"],
        element=2 if settings.get("bf16") and not machines.cpu else 4,
        rollouts=trl[MICRO] * (trl["steps_per_generation"] or trl[ACCUMULATION]),
        capo=run.capo.on,
        adam=run.capo.optimizer_model == "adam",
        support=min(run.capo.top_k + 1, shape.vocabulary),
        steps=trl["max_steps"],
        save_every=round(trl["save_steps"]) or 1,
    )


def _check_micro_batch(settings: dict[str, Any], ranks: int) -> None:
    """Refuse a micro-batch that does not divide a rank's completions, and name one that does."""
    completions, given = settings.get("completions_per_step"), settings.get(MICRO)
    if isinstance(completions, int) and isinstance(given, int) and min(completions, given) > 0:
        best = largest_micro_batch(completions, ranks, given)
        if best != given:
            raise CapacityError(
                f"each of {ranks} training GPUs has {completions // ranks} completions a step, which micro-batches of "
                f'{given} do not make up: set ARGS="{MICRO}={best}"'
            )


def _split_gpus(machines: Machines, generation: str) -> tuple[int, int]:
    """Numbers of training and of serving GPUs; raises CapacityError if none would be left to train."""
    total = machines.gpus * machines.nodes
    if generation != "vllm_server":
        return total, 0
    servers = machines.server_gpus or (machines.gpus if machines.nodes > 1 else 1)
    if servers >= total:
        raise CapacityError(
            f"SERVER_GPUS must be 1 to {total - 1} of the {total} GPUs, got {servers}: set another number"
        )
    return total - servers, servers
