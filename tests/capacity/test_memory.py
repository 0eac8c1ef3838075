"""The formulas for memory, against torch's own count."""

from dataclasses import replace

import pytest
import torch

from open_r1_capo.capacity import memory
from open_r1_capo.capacity.devices import find_device
from open_r1_capo.capacity.shapes import KNOWN
from open_r1_capo.capo import AdamStep
from shapes import TINY, model, padded, workload


def kept_bytes(shape, dtype):
    """Bytes that a forward pass keeps for its backward pass, parameters left out, and its tokens."""
    policy, batch, storages = model(shape, dtype).train(), padded(), {}
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.model(**batch)
    return sum(size for pointer, (size, _) in storages.items() if pointer not in own), batch["input_ids"].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layers_activations_are_what_autograd_keeps(dtype):
    (three, tokens), (two, _) = (kept_bytes(replace(TINY, layers=n), dtype) for n in (3, 2))
    assert (three - two) / tokens == pytest.approx(memory.layer_activations(TINY, dtype.itemsize), rel=0.01)


def test_checkpointing_keeps_a_vector_a_layer_and_one_layer():
    whole, less = (memory.activations(KNOWN["7b"], 1, 2, checkpointing) for checkpointing in (False, True))
    layer = memory.layer_activations(KNOWN["7b"], 2)
    assert whole - less == 27 * layer - 28 * 2 * 3584


def test_states_are_those_of_adam():
    policy = model(TINY)
    adam = torch.optim.AdamW(policy.parameters())
    policy(**padded()).logits.sum().backward()
    adam.step()
    moments = sum(s[key].nbytes for s in adam.state.values() for key in ("exp_avg", "exp_avg_sq"))
    sizes = [sum(x.nbytes for x in xs) for xs in ([*policy.parameters()], [p.grad for p in policy.parameters()])]
    assert memory.states(TINY.parameters, "ddp", 1, 4) == (*sizes, moments)


@pytest.mark.parametrize(
    ("accelerator", "expected"),
    [("zero2", (2, 0.5, 3)), ("zero3", (0.5, 0.5, 3)), ("ddp", (6, 4, 8)), ("fsdp", (1, 1, 2))],
)
def test_sharded_states(accelerator, expected):
    """Bytes a parameter in bfloat16 on four ranks, as the ZeRO paper counts: 2 + 2 + 12, or 4 + 4 + 8."""
    assert memory.states(1000, accelerator, 4, 2) == tuple(1000 * x for x in expected)


def test_deepspeed_keeps_masters_of_float32_weights_too():
    """As benchmarks/ranks.py measured of two ranks: 6 bytes a parameter."""
    assert memory.states(1000, "zero2", 2, 4) == (4000, 2000, 6000)
    assert memory.states(1000, "zero3", 2, 4) == (2000, 2000, 6000)
    assert memory.states(1000, "fsdp", 2, 4) == (2000, 2000, 4000)


def test_the_cache_is_transformers():
    policy = model(TINY)
    cache = policy(**{**padded(3, 12), "use_cache": True}).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size == 3 * 12 * TINY.kv_bytes(4)
    assert memory.kv_cache(TINY, 3, 12, 4) == size * 1.5  # two layers, of which one is there twice


def test_moments_are_adam_steps():
    step = AdamStep(TINY.vocabulary, TINY.hidden)
    step.table.grow(torch.arange(TINY.vocabulary))
    assert step.table.first.nbytes + step.table.second.nbytes == memory.moments(TINY.vocabulary, TINY.hidden)


def test_capo_off_costs_nothing():
    work = workload("grpo_aggressive", "capo.mode=off")
    assert not [item for item in memory.memory_items(work, find_device("h100")) if "CAPO" in item.name]


def test_the_host_has_no_cuda():
    cpu, work = find_device("cpu"), workload("capo_aggressive", "scale=lab", gpus=1, cpu=True)
    assert 1e8 < cpu.usable < cpu.memory
    assert not [item for item in memory.memory_items(work, cpu) if "CUDA" in item.name]
