"""Memory of one GPU, in bytes: each item a formula, and the phases of a step in which it is there.

P parameters, W ranks, w bytes of a weight in the forward pass (2 in bfloat16, 4 in float32). What is allocated by the
longest prompt and completion is counted at these limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from open_r1_capo.capacity.devices import CONTEXT_BYTES, Device
from open_r1_capo.capacity.shapes import ModelShape
from open_r1_capo.capacity.workload import Workload

BUCKET = 500_000_000  # elements that DeepSpeed collects before it reduces them (reduce_bucket_size)
LIVE_PARAMETERS = 1_000_000_000  # that ZeRO-3 keeps gathered (stage3_max_live_parameters)
HEAD_TILE = (4096, 32768)  # tokens × vocabulary of a tile of TRL's fused log-probabilities
LOGITS_BYTES = 64 * 2**20  # of a chunk of the support pass, as in features.py; three of that size live at once
PHASES = ("generation", "training", "update")


@dataclass(frozen=True)
class MemoryItem:
    """Some memory of a GPU."""

    name: str
    size: float  # bytes
    phases: tuple[str, ...] = PHASES  # when it is there
    note: str = ""  # how it comes about


def states(parameters: int, accelerator: str, ranks: int, element: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state that stay on a GPU.

    In mixed precision DeepSpeed has bfloat16 weights and gradients (2 P each) and Adam's float32 weights and two
    moments (12 P): ZeRO-2 shards the latter two, ZeRO-3 all. DDP and FSDP have float32 weights and gradients (4 P
    each) and moments (8 P); autocast adds a bfloat16 copy, under DDP of all weights. In float32 DeepSpeed keeps its
    second copy all the same (measured: docs/parallelism.md); one process trains without DeepSpeed then.
    """
    p, shard = parameters, parameters / ranks
    mixed = element == 2
    deepspeed = (12 if mixed or ranks > 1 else 8) * shard
    if accelerator == "zero2":
        return element * p, element * shard, deepspeed
    if accelerator == "zero3":
        return element * shard, element * shard, deepspeed
    if accelerator == "ddp":
        return 4 * p + (2 * p if mixed else 0), 4 * p, 8 * p
    return 4 * shard, 4 * shard, 8 * shard


def gathered(shape: ModelShape, accelerator: str, ranks: int, element: int) -> float:
    """Bytes of sharding's buffers: ZeRO's reduce bucket, the gathered weights of ZeRO-3 (at most 10⁹) and FSDP.

    FSDP gathers what it wraps: a layer and the next one, beside the unit that holds embedding and head.
    """
    p = shape.parameters
    if ranks == 1 or accelerator == "ddp":
        return 0
    if accelerator == "fsdp":
        return element * (2 * shape.layer_matrices + (1 if shape.tied else 2) * shape.head_matrix)
    bucket = element * min(p, BUCKET)
    return bucket if accelerator == "zero2" else 2 * bucket + element * min(p, LIVE_PARAMETERS)


def layer_activations(shape: ModelShape, element: int) -> int:
    """Bytes a token that one decoder layer keeps for its backward pass, in transformers' eager code with sdpa.

    Each of two norms keeps its input in float32, the root's inverse, the normalised vector and its product with the
    weight: (4 + 2w) D + 4. Attention keeps query, and key and value repeated for every query head (a padded batch
    has a mask, with which sdpa takes no grouped heads), and its output: 4 w · queries, and a float32 log-sum a head.
    The gated layer keeps gate, its activation, up and their product: 4 w I.
    """
    norms = 2 * ((4 + 2 * element) * shape.hidden + 4)
    return norms + 4 * element * shape.queries + 4 * shape.heads + 4 * element * shape.intermediate


def activations(shape: ModelShape, tokens: int, element: int, checkpointing: bool) -> float:
    """Bytes that the backbone keeps of a micro-batch's `tokens` (padding included) at the peak.

    With checkpointing the input of each layer, and one layer whole while its backward pass runs; the gradients of its
    three widest vectors are then there as well (3 w I), either way. The last norm keeps (4 + 2w) D.
    """
    layer = layer_activations(shape, element)
    kept = shape.layers * element * shape.hidden + layer if checkpointing else shape.layers * layer
    return tokens * (kept + 3 * element * shape.intermediate + (4 + 2 * element) * shape.hidden)


def head_scratch(shape: ModelShape, tokens: int, element: int) -> float:
    """Bytes of TRL's fused log-probabilities of `tokens` completion tokens, which never hold tokens × V logits.

    A tile; the hidden states chosen (w D), their float32 gradient (4 D) and seven running numbers a token; and the
    head's gradient in float32 (4 D V) with its copy as the weight's (w D V).
    """
    tile = min(tokens, HEAD_TILE[0]) * min(HEAD_TILE[1], shape.vocabulary) * element
    return tile + tokens * ((4 + element) * shape.hidden + 28) + (4 + element) * shape.head_matrix


def kv_cache(shape: ModelShape, sequences: int, tokens: int, element: int) -> float:
    """Bytes of keys and values of `sequences` of `tokens`, and one layer's twice: transformers grows it by copying."""
    whole = sequences * tokens * shape.kv_bytes(element)
    return whole * (1 + 1 / shape.layers)


def moments(rows: int, width: int) -> int:
    """Bytes of CAPO's two float32 moments of `rows` vocabulary rows and the zero row: 8 · (rows + 1) · D."""
    return 8 * (rows + 1) * width


def capo_scratch(workload: Workload) -> float:
    """Bytes of CAPO at the peak of a step, beside the moments.

    The features of every micro-batch wait for the commit (w D a token), with ids, probabilities and one number a
    slot (8 + 4 + 4 bytes · K); the touched rows' gradient, its aligned and its reduced copy (4 D a row each); and
    the support pass.
    """
    tokens = workload.sequences * workload.completion_limit
    per_token = workload.element * workload.shape.hidden + 16 * workload.support
    logits = min(LOGITS_BYTES, 4 * tokens // workload.accumulation * workload.shape.vocabulary)
    return tokens * per_token + 3 * 4 * workload.rows * workload.shape.hidden + 3 * logits


def memory_items(workload: Workload, device: Device) -> list[MemoryItem]:
    """All items of a training GPU's memory that are not empty."""
    shape, w, ranks = workload.shape, workload.element, workload.ranks
    weights, gradients, optimizer = states(shape.parameters, workload.accelerator, ranks, w)
    padded = workload.micro_batch * (workload.prompt_limit + workload.completion_limit)
    completion = workload.micro_batch * workload.completion_limit
    how = f"{workload.micro_batch} × ({workload.prompt_limit} + {workload.completion_limit}) tokens"
    how += ", recomputed" if workload.checkpointing else ""
    items = [
        MemoryItem("weights", weights, note=workload.accelerator if ranks > 1 else "one process"),
        MemoryItem("gradients", gradients, ("training", "update")),
        MemoryItem("optimizer: master weights, two moments", optimizer),
        MemoryItem("buffers of sharding", gathered(shape, workload.accelerator, ranks, w), ("training", "update")),
        MemoryItem("activations", activations(shape, padded, w, workload.checkpointing), ("training",), how),
        MemoryItem("fused log-probabilities", head_scratch(shape, completion, w), ("training",)),
        MemoryItem("float32 gradients of the shard", _update_scratch(workload), ("update",)),
        *_generation_items(workload, device),
    ]
    if workload.capo:
        bound = moments(shape.vocabulary, shape.hidden) if workload.adam else 0
        share = moments(workload.rows, shape.hidden) / moments(shape.vocabulary, shape.hidden)
        note = f"of all {shape.vocabulary:,} rows; about {share:.0%} of it after a step"
        items += [
            MemoryItem("CAPO: moments", bound, note=note),
            MemoryItem("CAPO: scratch", capo_scratch(workload), ("training",)),
        ]
    if not device.is_cpu:
        items.append(MemoryItem("CUDA, NCCL, graphs", CONTEXT_BYTES, note="assumed"))
    return [item for item in items if item.size > 0]


def _update_scratch(workload: Workload) -> float:
    """DeepSpeed converts its shard of the gradients to float32 before Adam reads it."""
    mixed_zero = workload.element == 2 and workload.accelerator in ("zero2", "zero3")
    return 4 * workload.shape.parameters / workload.ranks if mixed_zero else 0


def _generation_items(workload: Workload, device: Device) -> list[MemoryItem]:
    shape, w = workload.shape, workload.element
    if workload.generation == "vllm_colocate":
        when = ("generation",) if workload.sleeps else PHASES
        note = f"{workload.engine_share:.0%} of the GPU" + (", asleep while training" if workload.sleeps else "")
        return [MemoryItem("vLLM: weights and KV cache", workload.engine_share * device.memory, when, note)]
    if workload.generation == "vllm_server":
        return []
    cache = kv_cache(shape, workload.rollouts, workload.prompt_limit + workload.completion_limit, w)
    items = [MemoryItem("KV cache", cache, ("generation",), f"{workload.rollouts} sequences at once")]
    if workload.accelerator in ("zero3", "fsdp") and workload.ranks > 1:
        whole = w * shape.parameters
        items.append(MemoryItem("whole weights, gathered", whole, ("generation",), "to generate"))
    return items


def engine_tokens(workload: Workload, device: Device) -> int:
    """Tokens of context that fit into a vLLM engine's KV cache, over the GPUs that it spans; negative if none."""
    share = 0.9 if workload.generation == "vllm_server" else workload.engine_share
    free = share * device.memory - workload.element * workload.shape.parameters / workload.tensor_parallel
    return math.floor(free * workload.tensor_parallel / workload.shape.kv_bytes(workload.element))


def peaks(items: Sequence[MemoryItem]) -> dict[str, float]:
    """Bytes in use in each phase."""
    return {phase: sum(item.size for item in items if phase in item.phases) for phase in PHASES}


def checkpoint_bytes(workload: Workload) -> float:
    """Bytes on disk of one checkpoint: weights, the optimizer of all ranks, and CAPO's moments of all rows.

    DeepSpeed keeps its own copy of the weights beside those to load: 2 P + 2 P + 12 P; without it 4 P + 8 P.
    """
    p, deepspeed = workload.shape.parameters, workload.accelerator in ("zero2", "zero3") and workload.element == 2
    capo = moments(workload.shape.vocabulary, workload.shape.hidden) if workload.capo and workload.adam else 0
    return (16 if deepspeed else 12) * p + capo
