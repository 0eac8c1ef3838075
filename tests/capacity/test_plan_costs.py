"""The planner's formulas for memory and time, against torch's own count."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from open_r1_capo.capacity import memory, timing
from open_r1_capo.capacity.devices import DEVICES, find_device
from open_r1_capo.capacity.shapes import KNOWN
from open_r1_capo.capacity.workload import Machines, read
from open_r1_capo.capo import AdamStep
from shapes import SCALE_7B, TINY, model, padded

# --- memory ----------------------------------------------------------------------------------------------------------


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


# --- time ------------------------------------------------------------------------------------------------------------


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_of_the_backbone():
    """Attention is counted in its plain form; a fused one computes the first of two products again (+ 0.5)."""
    policy, batch = model(TINY), padded()
    policy.set_attn_implementation("eager")
    forward, plain = timing.backbone_flops(TINY, 3, 12), 3 * TINY.layers * timing.attention_flops(TINY, 12)
    with torch.no_grad():
        assert counted(lambda: policy.model(**batch)) == pytest.approx(forward, rel=1e-3)
    trained = counted(lambda: policy.model(**batch).last_hidden_state.sum().backward())
    assert trained == pytest.approx(timing.training_flops(TINY, 3, 12, False) - 0.5 * plain, rel=1e-3)
    again = timing.training_flops(TINY, 3, 12, True) - timing.training_flops(TINY, 3, 12, False)
    assert again == forward


def test_flops_of_the_fused_head():
    tokens, weight = torch.randn(7, TINY.hidden, requires_grad=True), torch.randn(96, TINY.hidden, requires_grad=True)
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function._schema.name in ("aten::mm", "aten::addmm_"):
                (a, b) = args[-2:]
                products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return out

    with Count():
        out = ChunkedLogProbFunction.apply(tokens, weight, None, torch.arange(7), 1.0, 32, None, 1.0, ("log_probs",))
        out[0].sum().backward()
    assert sum(products) == timing.head_flops(TINY, 7, 4)


def test_communication_by_hand():
    """7.6 billion bfloat16 weights over NVLink at 315 GB/s: reduced for each micro-batch, gathered once."""
    work, h100 = read("capo_aggressive", [SCALE_7B], Machines()).split(24), DEVICES["h100"]
    size = 2 * 7_615_616_512 * 0.75 / (0.7 * 450e9)
    assert timing.communication_seconds(work, h100) == pytest.approx(2 * size)
    assert timing.communication_seconds(work.split(12), h100) == pytest.approx(3 * size)
    assert timing.communication_seconds(replace(work, accelerator="zero3"), h100) == pytest.approx(3 * size)
    assert timing.communication_seconds(replace(work, accelerator="ddp"), h100) == pytest.approx(4 * size)
    assert timing.communication_seconds(replace(work, nodes=2), h100) == pytest.approx(2 * size * 9)


def test_decoding_reads_every_weight():
    work = read("capo_aggressive", [SCALE_7B], Machines())
    load = timing.decode_load(KNOWN["7b"], 24, 768, 2)
    weights = KNOWN["7b"].parameters - KNOWN["7b"].head_matrix  # the embedding is looked up
    assert load.streamed == pytest.approx(2 * weights + 24 * 768 * 57344, rel=1e-4)  # but for norms and biases
    seconds = load.streamed / (0.8 * 3.35e12) + timing.ENGINE_STEP_SECONDS
    assert timing.engine_seconds(work, DEVICES["h100"], 24, 1024) == pytest.approx(1024 * seconds, rel=0.05)


def test_a_full_cache_makes_waves():
    work, h100 = read("capo_aggressive", [SCALE_7B], Machines()), DEVICES["h100"]
    room = memory.engine_capacity(work, h100) // (256 + 1024)
    one, two = (timing.engine_seconds(work, h100, n, 1024) for n in (room, room + 1))
    assert two > 1.5 * one


def test_completions_that_serve_two_steps_are_generated_once():
    h100, once = DEVICES["h100"], read("grpo_aggressive", [SCALE_7B], Machines())
    twice = read("grpo_aggressive", [SCALE_7B, "num_iterations=2"], Machines())
    assert timing.generation_seconds(twice, h100) == pytest.approx(timing.generation_seconds(once, h100) / 2)
    assert timing.sync_seconds(twice, h100) == pytest.approx(timing.sync_seconds(once, h100) / 2)
    assert timing.train_seconds(twice, h100) > timing.train_seconds(once, h100)  # the old policy's forward pass


def test_a_rank_generates_all_its_completions_at_once():
    micro = [SCALE_7B, "per_device_train_batch_size=6"]
    work = read("grpo_aggressive", micro, Machines(generation="transformers"))
    assert (work.micro_batch, work.accumulation, work.rollouts, work.generations) == (6, 4, 24, 1)
    more = read("grpo_aggressive", [*micro, "steps_per_generation=8", "save_steps=8"], Machines())
    assert (more.rollouts, more.generations) == (48, 0.5)


def test_capo_off_costs_nothing():
    work = read("grpo_aggressive", [SCALE_7B, "capo.mode=off"], Machines())
    names = {*timing.rows(work, DEVICES["h100"]), *(part.name for part in memory.parts(work, DEVICES["h100"]))}
    assert not [name for name in names if "CAPO" in name or "KL" in name]


def test_the_cpu_measures_itself():
    cpu = find_device("cpu")
    assert 1e9 < cpu.flops < 1e13
    assert 1e8 < cpu.bandwidth < 1e13


def test_a_layers_operators():
    """What one more layer adds to the kernels of a generated token; views launch none."""
    views = {"view", "_unsafe_view", "transpose", "t", "expand", "slice", "unsqueeze", "select", "alias", "detach"}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        kernels = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.kernels += function._schema.name.removeprefix("aten::") not in views
            return function(*args, **(kwargs or {}))

    def kernels(layers):
        policy, batch = model(replace(TINY, layers=layers), torch.bfloat16), padded()
        with torch.no_grad():
            cache = policy(**{**batch, "use_cache": True}).past_key_values
            mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
            with Count() as count:
                policy(input_ids=batch["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
        return count.kernels

    assert kernels(3) - kernels(2) == timing.LAYER_OPERATORS
