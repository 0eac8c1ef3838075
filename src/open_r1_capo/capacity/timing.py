"""Seconds of one optimizer step, as rows of the paper's Table 1: operations, bytes and operators over what a GPU does.

A row takes the longest of its matrix products, its memory traffic and the host's time to issue its operators, which a
GPU overlaps; on a CPU they add up. Lengths are the expected ones, padded as TRL pads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from open_r1_capo.capacity.devices import (
    DISK_RATE,
    ENGINE_STEP_SECONDS,
    LINK_SHARE,
    OPERATOR_SECONDS,
    STREAM_SHARE,
    Device,
)
from open_r1_capo.capacity.memory import activations, checkpoint_bytes, engine_capacity
from open_r1_capo.capacity.shapes import ModelShape
from open_r1_capo.capacity.workload import Workload

LAYER_OPERATORS = 45  # kernels of one Qwen2 layer when a token is generated in bfloat16; 41 in float32
OTHER_OPERATORS = 76  # of embedding, mask, last norm, head and sampling
ACTIVATION_PASSES = 4  # what the backward pass needs is written and read once, and so is its gradient
LOGITS_TRAFFIC = 32  # bytes a logit of the support pass: written, cast, divided, summed and searched
CPU_ENTRIES = {"propose": 2.7e9, "commit": 6.1e9, "planned": 5.4e9}  # (token, id, d) a second: benchmarks/results
NAMES = (
    "generation",
    "weights to the engine",
    "forward and backward",
    "CAPO: support pass",
    "CAPO: propose",
    "CAPO: commit",
    "measured KL",
    "optimizer",
    "communication",
    "checkpoints",
)


@dataclass(frozen=True)
class Load:
    """Work of one GPU.

    Attributes:
        flops: of matrix products.
        streamed: bytes read and written beside them.
        operators: kernels that the host issues.
    """

    flops: float = 0
    streamed: float = 0
    operators: float = 0


def seconds(load: Load, device: Device, share: float | None = None) -> float:
    """How long a load takes.

    Args:
        load: the work.
        device: where; its `matmul_share` of the peak is reached.
        share: another share of the peak.

    Returns:
        The largest of three times; on a CPU, which issues its own operators, their sum.
    """
    times = [
        load.flops / (device.flops * (share or device.matmul_share)),
        load.streamed / (device.bandwidth * STREAM_SHARE),
        load.operators * OPERATOR_SECONDS,
    ]
    return sum(times) if device.is_cpu else max(times)


def backbone_flops(shape: ModelShape, sequences: int, length: int) -> float:
    """Operations of a forward pass without the head: 2 a weight and token, and 4 s² · queries a layer and sequence.

    Attention's two products are counted in full, as torch's counter does, though a kernel may skip the masked half.

    Args:
        shape: of the model.
        sequences: padded to one length.
        length: in tokens.

    Returns:
        Operations.
    """
    products = 2 * shape.layers * shape.layer_matrices * length
    return sequences * (products + shape.layers * attention_flops(shape, length))


def attention_flops(shape: ModelShape, length: int) -> float:
    """Operations of one layer's attention to a sequence: Q Kᵀ and its product with V, 2 s² · queries each."""
    return 4 * length**2 * shape.queries


def training_flops(shape: ModelShape, sequences: int, length: int, checkpointing: bool) -> float:
    """Operations of the backbone's forward and backward pass.

    A product's backward pass is two products. A fused attention computes Q Kᵀ again and has four: 2.5 times its
    forward pass. Checkpointing adds a forward pass.

    Args:
        shape: of the model.
        sequences: padded to one length.
        length: in tokens.
        checkpointing: recompute.

    Returns:
        Operations.
    """
    forward = backbone_flops(shape, sequences, length)
    attention = sequences * shape.layers * attention_flops(shape, length)
    return (4 if checkpointing else 3) * forward + 0.5 * attention


def head_flops(shape: ModelShape, tokens: float, passes: int = 1) -> float:
    """Operations of `passes` products of `tokens` with the LM head, 2 D V each.

    TRL's fused log-probabilities take four: forward, the same again in the backward pass, and two gradients.

    Args:
        shape: of the model.
        tokens: of the completions.
        passes: products with the head.

    Returns:
        Operations.
    """
    return 2 * passes * tokens * shape.head_matrix


def train_seconds(workload: Workload, device: Device) -> float:
    """Forward and backward passes of one rank's micro-batches (and the old policy's forward pass, if it is needed)."""
    shape, length = workload.shape, workload.prompt_tokens + workload.completion_tokens
    tokens = workload.sequences * workload.completion_tokens
    flops = training_flops(shape, workload.sequences, length, workload.checkpointing) + head_flops(shape, tokens, 4)
    streamed = ACTIVATION_PASSES * activations(shape, workload.sequences * length, workload.element, False)
    passes = 4 if workload.checkpointing else 3
    if workload.passes > 1:
        flops += (backbone_flops(shape, workload.sequences, length) + head_flops(shape, tokens)) / workload.passes
        passes += 1 / workload.passes
    operators = workload.accumulation * passes * forward_operators(shape)
    return seconds(Load(flops, streamed, operators), device)


def forward_operators(shape: ModelShape) -> int:
    """Kernels of one eager forward pass."""
    return shape.layers * LAYER_OPERATORS + OTHER_OPERATORS


# --- generation ------------------------------------------------------------------------------------------------------


def decode_load(shape: ModelShape, sequences: float, context: float, element: int) -> Load:
    """One more token of each sequence: every weight and the whole cache are read once."""
    weights = shape.layers * shape.layer_matrices + shape.head_matrix
    flops = sequences * (2 * weights + 4 * shape.layers * shape.queries * context)
    streamed = element * weights + sequences * context * shape.kv_bytes(element)
    return Load(flops, streamed, forward_operators(shape))


def generation_seconds(workload: Workload, device: Device) -> float:
    """Until the longest completion ends: prompts at once, then token by token with half of the context on average.

    transformers issues every operator of every token from the host, for all sequences of the rank at once. A vLLM
    engine replays graphs; what does not fit into its cache waits.

    Args:
        workload: what runs.
        device: where.

    Returns:
        Seconds a step.
    """
    tokens = workload.completion_tokens
    if workload.generation == "transformers":
        return workload.generations * _decode_seconds(workload, device, workload.rollouts, tokens)
    engines = (workload.servers or workload.ranks) / workload.tensor_parallel
    batch = workload.rollouts * workload.ranks / engines
    return workload.generations * engine_seconds(workload, device, batch, tokens)


def _decode_seconds(workload: Workload, device: Device, sequences: float, tokens: int) -> float:
    context = workload.prompt_tokens + tokens / 2
    prefill = Load(backbone_flops(workload.shape, sequences, workload.prompt_tokens))
    step = decode_load(workload.shape, sequences, context, workload.element)
    return seconds(prefill, device) + tokens * seconds(step, device)


def engine_seconds(workload: Workload, device: Device, sequences: float, tokens: int) -> float:
    """A vLLM engine's time for `sequences` completions of `tokens`, in waves that its cache can hold.

    The weights and the cache are shared by the engine's GPUs.

    Args:
        workload: what runs.
        device: where.
        sequences: of one engine.
        tokens: of each completion.

    Returns:
        Seconds.
    """
    capacity = max(1, engine_capacity(workload, device) // (workload.prompt_tokens + tokens))
    waves = math.ceil(sequences / capacity)
    context, span = workload.prompt_tokens + tokens / 2, workload.tensor_parallel
    load = decode_load(workload.shape, sequences / waves, context, workload.element)
    prefill = seconds(Load(backbone_flops(workload.shape, sequences, workload.prompt_tokens) / span), device)
    step = seconds(Load(load.flops / span, load.streamed / span), device) + ENGINE_STEP_SECONDS
    return prefill + waves * tokens * step


def sync_seconds(workload: Workload, device: Device) -> float:
    """New weights into the engine: read and written in the same GPU's memory, or sent to the servers; 0 without one.

    Under ZeRO-3 and FSDP every rank gathers them first.

    Args:
        workload: what runs.
        device: where.

    Returns:
        Seconds a step.
    """
    if workload.generation == "transformers":
        return 0
    size = workload.element * workload.shape.parameters
    gather = size / rate(workload, device) if workload.accelerator in ("zero3", "fsdp") and workload.ranks > 1 else 0
    if workload.generation == "vllm_server":
        return workload.generations * (gather + size / rate(workload, device))
    copy = 2 * size / workload.tensor_parallel / (device.bandwidth * STREAM_SHARE)
    return workload.generations * (gather + copy)


# --- CAPO ------------------------------------------------------------------------------------------------------------


def capo_seconds(workload: Workload, device: Device) -> dict[str, float]:
    """Support pass, propose and commit (with what the committed step means for its tokens); empty with CAPO off.

    The support costs one product with the head and a few passes over the logits. Proposing reads the features of each
    (token, id) once and the moments of the touched rows once; committing reads the features, and reads and writes the
    rows; `planned` is as proposing. On a CPU these are compute-bound: the benchmark's entries a second.

    Args:
        workload: what runs.
        device: where.

    Returns:
        Seconds a step of each row.
    """
    if not workload.capo:
        return {}
    shape, tokens = workload.shape, workload.sequences * workload.completion_tokens
    support = seconds(Load(head_flops(shape, tokens)), device)
    support += seconds(Load(streamed=LOGITS_TRAFFIC * tokens * shape.vocabulary), device)
    entries = tokens * workload.support * shape.hidden
    if device.is_cpu:
        times = {name: entries / rate for name, rate in CPU_ENTRIES.items()}
    else:
        rows = workload.rows * shape.hidden
        traffic = {
            "propose": 2 * entries + 8 * rows,
            "commit": 2 * entries + 24 * rows,
            "planned": 2 * entries + 8 * rows,
        }
        times = {name: seconds(Load(streamed=size), device) for name, size in traffic.items()}
    commit = times["commit"] + times["planned"] + row_seconds(workload, device)
    return {"CAPO: support pass": support, "CAPO: propose": times["propose"], "CAPO: commit": commit}


def row_seconds(workload: Workload, device: Device) -> float:
    """The all-reduce of the touched rows' float32 gradient."""
    size = 4 * workload.rows * workload.shape.hidden
    return 2 * size * ring(workload.ranks) / rate(workload, device)


def measured_kl_seconds(workload: Workload, device: Device) -> float:
    """A forward pass of a share of the sequences after the step, and two of its tokens through the head."""
    if not workload.capo or not workload.measured:
        return 0
    shape, sequences = workload.shape, workload.sequences * workload.measured
    tokens = sequences * workload.completion_tokens
    length = workload.prompt_tokens + workload.completion_tokens
    flops = backbone_flops(shape, sequences, length) + head_flops(shape, tokens, 2)
    streamed = seconds(Load(streamed=2 * LOGITS_TRAFFIC / 2 * tokens * shape.vocabulary), device)
    return streamed + seconds(Load(flops, 0, workload.accumulation * forward_operators(shape)), device)


# --- the update ------------------------------------------------------------------------------------------------------


def optimizer_seconds(workload: Workload, device: Device) -> float:
    """Adam's traffic over this rank's shard.

    Mixed precision: gradient read and cast (2 + 4), then gradient, weight and moments read (16), weight and moments
    written (12) and the bfloat16 weight (2): 36 bytes a parameter. In float32: 16 read and 12 written.

    Args:
        workload: what runs.
        device: where.

    Returns:
        Seconds a step.
    """
    mixed = workload.element == 2 and workload.accelerator != "ddp"
    shard = 1 if workload.accelerator == "ddp" else workload.ranks
    return seconds(Load(streamed=(36 if mixed else 28) * workload.shape.parameters / shard), device)


def ring(ranks: int) -> float:
    """Share of a buffer that a rank sends in a ring's reduce-scatter or all-gather: (W - 1) / W."""
    return (ranks - 1) / ranks


def rate(workload: Workload, device: Device) -> float:
    """Bytes a second between ranks: over the network as soon as there are two nodes."""
    return LINK_SHARE * (device.network if workload.nodes > 1 else device.link)


def communication_seconds(workload: Workload, device: Device) -> float:
    """What the ranks exchange of the model, were nothing of it hidden behind computation.

    ZeRO-2 reduces the gradients of every micro-batch (w P) and gathers the weights once a step (w P). ZeRO-3 and FSDP
    gather the weights for each forward and each backward pass and reduce in between (3 w P a micro-batch). DDP reduces
    float32 gradients once, there and back (2 · 4 P).

    Args:
        workload: what runs.
        device: where.

    Returns:
        Seconds a step.
    """
    size = workload.element * workload.shape.parameters
    if workload.accelerator == "ddp":
        sent = 8 * workload.shape.parameters
    elif workload.accelerator == "zero2":
        sent = size * (workload.accumulation + 1)
    else:
        sent = 3 * size * workload.accumulation
    return sent * ring(workload.ranks) / rate(workload, device)


def rows(workload: Workload, device: Device) -> dict[str, float]:
    """Seconds of each of `NAMES`, those that take none left out."""
    found = {
        "generation": generation_seconds(workload, device),
        "weights to the engine": sync_seconds(workload, device),
        "forward and backward": train_seconds(workload, device),
        **capo_seconds(workload, device),
        "measured KL": measured_kl_seconds(workload, device),
        "optimizer": optimizer_seconds(workload, device),
        "communication": communication_seconds(workload, device),
        "checkpoints": checkpoint_bytes(workload) / DISK_RATE / workload.save_every,
    }
    return {name: found[name] for name in NAMES if found.get(name)}


# --- evaluation ------------------------------------------------------------------------------------------------------

EVALUATION = {  # problems × samples of docs/evaluation.md
    "GSM8K": 1319,
    "MATH500": 500,
    "OlympiadBench": 674,
    "MinervaMath": 272,
    "GPQA-Diamond": 198,
    "AMC23": 40 * 16,
    "AIME24": 30 * 16,
    "AIME25": 30 * 16,
}
EVALUATION_START = 90.0  # seconds until an engine has loaded its weights and captured its graphs, assumed
CONCURRENT = 256  # sequences that a vLLM engine decodes at once (max_num_seqs)


def evaluation_seconds(workload: Workload, device: Device) -> float:
    """One checkpoint on the eight benchmarks, an engine on each GPU, every answer as long as a training completion."""
    answers = sum(EVALUATION.values()) / workload.gpus
    waves = math.ceil(answers / CONCURRENT)
    tokens = workload.completion_tokens
    load = decode_load(workload.shape, answers / waves, workload.prompt_tokens + tokens / 2, workload.element)
    step = seconds(Load(load.flops, load.streamed), device) + ENGINE_STEP_SECONDS
    return EVALUATION_START + waves * tokens * step
