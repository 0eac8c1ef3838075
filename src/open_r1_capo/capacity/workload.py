"""What a recipe asks of each process: its settings as the numbers that the formulas need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from open_r1_capo.capacity.shapes import ModelShape, PlanError, find_shape
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import TRL_FIELDS, ConfigError, RunConfig
from open_r1_capo.training.build import build

ACCELERATORS = ("zero2", "zero3", "ddp", "fsdp")
BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")
LAB_PROMPT = 16  # tokens of a lab problem with its template
ROWS_SEEN = (2048, 5000)  # tokens and their distinct support ids in the benchmark of the curvature engine


@dataclass(frozen=True)
class Workload:
    """One recipe on so many GPUs.

    Attributes:
        title: recipe and scale.
        shape: of the policy.
        nodes: machines.
        ranks: processes that train, one a GPU.
        servers: GPUs that only generate.
        micro_batch: sequences of one forward pass of a rank.
        accumulation: forward passes of an optimizer step.
        prompt_limit: longest prompt, in tokens; what memory is planned for.
        completion_limit: longest completion, likewise.
        prompt_tokens: length that the prompts of a micro-batch are padded to; what time is planned for.
        completion_tokens: length of the completions, likewise.
        checkpointing: activations are computed again in the backward pass.
        accelerator: zero2, zero3, ddp or fsdp.
        generation: transformers, vllm_colocate or vllm_server.
        tensor_parallel: GPUs that a vLLM engine spans.
        engine_share: of a GPU's memory, for a vLLM engine beside the trainer.
        sleeps: that engine leaves the memory while the policy trains.
        element: bytes of a weight in the forward pass: 2 in bfloat16, 4 in float32.
        rollouts: sequences of a rank that are generated at once.
        passes: optimizer steps on the same completions; above 1 the old policy's probabilities cost a forward pass.
        capo: CAPO judges tokens (any mode but off).
        adam: its optimizer model is Adam, which has moments.
        support: K, ids of a token's support.
        measured: share of the sequences on which the true KL is measured.
        steps: optimizer steps of a run.
        save_every: of them, between two checkpoints.
    """

    title: str
    shape: ModelShape
    nodes: int
    ranks: int
    servers: int
    micro_batch: int
    accumulation: int
    prompt_limit: int
    completion_limit: int
    prompt_tokens: int
    completion_tokens: int
    checkpointing: bool
    accelerator: str
    generation: str
    tensor_parallel: int
    engine_share: float
    sleeps: bool
    element: int
    rollouts: int
    passes: int
    capo: bool
    adam: bool
    support: int
    measured: float
    steps: int
    save_every: int

    @property
    def sequences(self) -> int:
        """Completions of one rank and optimizer step."""
        return self.micro_batch * self.accumulation

    @property
    def completions(self) -> int:
        """Completions of an optimizer step over all ranks."""
        return self.sequences * self.ranks

    @property
    def generations(self) -> float:
        """How often completions are generated in an optimizer step: 1, or less where they serve several steps."""
        return self.sequences / self.rollouts / self.passes

    @property
    def gpus(self) -> int:
        """GPUs in use, servers included."""
        return self.ranks + self.servers

    @property
    def rows(self) -> int:
        """Distinct vocabulary rows that one step's supports touch, estimated: they grow as the root of the tokens.

        Heaps' law with exponent ½, through the benchmark's 5000 rows of 2048 tokens; at most V.
        """
        tokens, rows = ROWS_SEEN
        return min(self.shape.vocabulary, round(rows * (self.completions * self.completion_tokens / tokens) ** 0.5))

    def split(self, micro_batch: int) -> Workload:
        """The same completions in micro-batches of another size, which must divide those of a rank."""
        return replace(self, micro_batch=micro_batch, accumulation=self.sequences // micro_batch)

    def on(self, ranks: int, **changes: Any) -> Workload:
        """The same completions on so many ranks, each in one micro-batch; `ranks` must divide the completions."""
        mine = self.completions // ranks
        rollouts = mine * self.rollouts // self.sequences
        return replace(self, ranks=ranks, micro_batch=mine, accumulation=1, rollouts=rollouts, **changes)


@dataclass(frozen=True)
class Machines:
    """What is asked for on the command line.

    Attributes:
        gpus: of each node.
        nodes: machines.
        accelerator: of `ACCELERATORS`; with one GPU or on the CPU nothing is sharded.
        generation: of `recipes/generation`, or None for the recipe's.
        server_gpus: that only generate, under vllm_server; None is one, or the last node of several.
        prompt_tokens: length of a prompt; None is 256, or the recipe's limit if that is less.
        completion_tokens: length of a completion; None is the recipe's limit.
        cpu: the trainer runs on the CPU.
    """

    gpus: int = 4
    nodes: int = 1
    accelerator: str = "zero2"
    generation: str | None = None
    server_gpus: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cpu: bool = False


def read(recipe: str, overrides: list[str], machines: Machines) -> Workload:
    """Compose a recipe and read off what it asks for.

    Args:
        recipe: its name.
        overrides: `key=value`, the scale among them.
        machines: what it shall run on.

    Returns:
        The workload.

    Raises:
        PlanError: a batch that cannot be split over the GPUs, a model of unknown shape, or no such choice.
        ConfigError: as training the recipe would.
    """
    chosen = [f"generation={machines.generation}"] if machines.generation else []
    settings = compose_recipe(recipe, [*overrides, *chosen])
    mode = settings.get("vllm_mode", TRL_FIELDS["vllm_mode"].default)
    generation = f"vllm_{mode}" if settings.get("use_vllm") else "transformers"
    if machines.accelerator not in ACCELERATORS:
        raise PlanError(f"ACCELERATOR must be one of {', '.join(ACCELERATORS)}, got {machines.accelerator!r}")
    ranks, servers = _ranks(machines, generation)
    micro_batch, accumulation = split(settings, ranks)
    # the ranges are checked as in training, but in one process on a CPU: that needs neither GPUs nor a launcher
    alone = {key: value for key, value in settings.items() if key != "per_device_train_batch_size"}
    alone |= {"gradient_accumulation_steps": accumulation, "needs_gpu": False, "use_cpu": True, "bf16": False}
    run, args = build(alone)
    shape = _lab_shape(run) if run.model_name_or_path == "lab" else find_shape(run.model_name_or_path)
    prompt_limit = run.data.max_prompt_tokens or 512
    return Workload(
        title=f"{recipe} on {run.scale}",
        shape=shape,
        nodes=machines.nodes,
        ranks=ranks,
        servers=servers,
        micro_batch=micro_batch,
        accumulation=accumulation,
        prompt_limit=LAB_PROMPT if run.data.name == "lab" else prompt_limit,
        completion_limit=args.max_completion_length,
        prompt_tokens=machines.prompt_tokens or (LAB_PROMPT if run.data.name == "lab" else min(256, prompt_limit)),
        completion_tokens=min(machines.completion_tokens or args.max_completion_length, args.max_completion_length),
        checkpointing=args.gradient_checkpointing,
        accelerator=machines.accelerator,
        generation=generation,
        tensor_parallel=args.vllm_tensor_parallel_size,
        engine_share=args.vllm_gpu_memory_utilization,
        sleeps=args.vllm_enable_sleep_mode,
        element=2 if settings.get("bf16") and not machines.cpu else 4,
        rollouts=micro_batch * args.steps_per_generation,
        passes=args.num_iterations,
        capo=run.capo.mode != "off",
        adam=run.capo.optimizer_model == "adam",
        support=min(run.capo.top_k + 1, shape.vocabulary),
        measured=run.capo.measure_kl,
        steps=args.max_steps,
        save_every=round(args.save_steps) or 1,
    )


def split(settings: dict[str, Any], ranks: int) -> tuple[int, int]:
    """Micro-batch and accumulation of each rank.

    Args:
        settings: of the recipe: the completions of a step, and either of the two.
        ranks: processes.

    Returns:
        Sequences of a forward pass, and forward passes.

    Raises:
        PlanError: they do not multiply to the completions; says which counts would.
    """
    for name in ("completions_per_step", *BATCH_KEYS):
        value = settings.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise PlanError(f"{name} must be a whole number above 0, got {value!r}")
    completions = settings["completions_per_step"]
    if completions % ranks:
        fitting = [n for n in range(1, 4 * ranks + 1) if completions % n == 0]
        near = ", ".join(map(str, sorted(sorted(fitting, key=lambda n: abs(n - ranks))[:4])))
        raise PlanError(
            f"{completions} completions a step cannot be shared by {ranks} training GPUs: choose GPUS and NODES that "
            f"give {near}, or another completions_per_step"
        )
    mine = completions // ranks
    micro_batch, accumulation = (settings.get(key) for key in BATCH_KEYS)
    micro_batch = micro_batch or (mine if not accumulation else max(1, mine // accumulation))
    if mine % micro_batch or (accumulation and micro_batch * accumulation != mine):
        best = max(n for n in range(1, min(micro_batch, mine) + 1) if mine % n == 0)
        raise PlanError(
            f"each of {ranks} training GPUs has {mine} completions a step, which micro-batches of {micro_batch} do "
            f'not make up: set ARGS="per_device_train_batch_size={best}"'
        )
    return micro_batch, mine // micro_batch


def _ranks(machines: Machines, generation: str) -> tuple[int, int]:
    """Training and serving GPUs.

    Args:
        machines: asked for.
        generation: of the recipe.

    Returns:
        Their numbers.

    Raises:
        PlanError: none of one kind would be left.
    """
    for name, value in {"GPUS": machines.gpus, "NODES": machines.nodes}.items():
        if value < 1:
            raise PlanError(f"{name} must be at least 1, got {value}")
    total = machines.gpus * machines.nodes
    if generation != "vllm_server":
        return total, 0
    servers = machines.server_gpus or (machines.gpus if machines.nodes > 1 else 1)
    if not 1 <= servers < total:
        raise PlanError(f"SERVER_GPUS must be 1 to {total - 1} of the {total} GPUs, got {servers}: set another number")
    return total - servers, servers


def _lab_shape(run: RunConfig) -> ModelShape:
    """The lab policy's, whose vocabulary is that of its tokenizer."""
    from open_r1_capo.tasks.lab.tokenizer import build_tokenizer

    lab = run.lab
    vocabulary = len(build_tokenizer(lab.max_length, lab.mixture.filler_tokens))
    sizes = (lab.layers, lab.hidden_size, lab.intermediate_size, lab.heads, lab.kv_heads, lab.hidden_size // lab.heads)
    return ModelShape("lab policy", *sizes, vocabulary, source="its settings")


__all__ = ["ACCELERATORS", "ConfigError", "Machines", "Workload", "read", "split"]
