"""The planner: every formula against torch's own count, and what a user sees."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from open_r1_capo.capo import AdamStep
from open_r1_capo.plan import memory, timing
from open_r1_capo.plan.__main__ import main, measured_seconds
from open_r1_capo.plan.devices import DEVICES, GIB, find_device
from open_r1_capo.plan.planner import fits, largest_micro_batch, make
from open_r1_capo.plan.shapes import KNOWN, ModelShape, PlanError, find_shape, from_config
from open_r1_capo.plan.workload import Machines, read

TINY = ModelShape("tiny", layers=2, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16, vocabulary=96)
SCALE_7B = "scale=qwen2.5-math-7b"


def config(shape, kind=Qwen2Config):
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )


def model(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(shape), dtype=dtype)


def padded(rows=3, length=12):
    """A batch with padding, as TRL makes it: with a mask, sdpa takes no grouped heads."""
    ids, mask = torch.randint(5, 90, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def plan_7b(*overrides, recipe="capo_aggressive", gpu="h100", **machines):
    return make(read(recipe, [SCALE_7B, *overrides], Machines(**machines)), DEVICES[gpu])


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*KNOWN.values(), TINY, replace(TINY, tied=True)], ids=lambda s: s.name)
def test_parameters_are_the_models(shape):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(shape))
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    twice = head.numel() if shape.tied and head is not embedding else 0  # tying is left out while another thread loads
    assert model.num_parameters() - twice == shape.parameters


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_a_config_gives_the_shape(kind):
    written = config(replace(TINY, head_dim=24 if kind is Qwen3Config else 16), kind)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(written).num_parameters()
    assert from_config(written.to_dict(), "x").parameters == real


def test_names_and_folders(tiny_policy, tmp_path):
    assert find_shape("Qwen/Qwen2.5-Math-7B").parameters == 7_615_616_512
    assert find_shape("models/Qwen2.5-Math-1.5B-Instruct").name == "Qwen2.5-1.5B"
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert find_shape(str(tiny_policy)).parameters == policy.num_parameters()
    with pytest.raises(PlanError, match=r"has no config\.json"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(PlanError, match="does not say the model's shape"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(PlanError, match="'mamba'"):
        find_shape(str(tmp_path))
    with pytest.raises(PlanError, match=r"Qwen2\.5-32B"):
        find_shape("org/unheard-of")


def test_the_lab_is_measured_by_its_own_settings(tiny_policy):
    """The fixture has the lab's sizes and its tokenizer."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy)
    work = read("capo_aggressive", ["scale=lab"], Machines(gpus=1, cpu=True))
    assert work.shape.parameters == policy.num_parameters()


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
    work, h100 = read("capo_aggressive", [SCALE_7B], Machines()), DEVICES["h100"]
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


# --- plans -----------------------------------------------------------------------------------------------------------


def test_the_papers_setting():
    """4 × H100, 24 sequences each, plain generation: the paper's 55.5 of 135.84 s are not fitted, nor are they met."""
    plan = plan_7b(generation="transformers")
    assert (plan.workload.micro_batch, plan.workload.accumulation) == (24, 1)
    assert plan.fits
    assert 0.25 < plan.rows["generation"] / 55.5 < 1.5
    capo = sum(seconds for name, seconds in plan.rows.items() if name.startswith("CAPO"))
    assert capo / plan.step < 0.03  # the paper's share


def test_the_largest_micro_batch_is_the_largest():
    work, h100 = read("grpo_conservative", [SCALE_7B], Machines()), DEVICES["h100"]
    largest = largest_micro_batch(work, h100)
    larger = next(n for n in range(largest + 1, work.sequences + 1) if work.sequences % n == 0)
    assert fits(work.split(largest), h100)
    assert not fits(work.split(larger), h100)


def test_the_sequences_split_over_more_gpus():
    eight = read("capo_aggressive", [SCALE_7B, "per_device_train_batch_size=4"], Machines(gpus=8))
    assert (eight.ranks, eight.micro_batch, eight.accumulation) == (8, 4, 3)
    server = read("capo_aggressive", [SCALE_7B, "per_device_train_batch_size=16"], Machines(generation="vllm_server"))
    assert (server.ranks, server.servers, server.completions) == (3, 1, 96)
    nodes = read("grpo_conservative", [SCALE_7B], Machines(nodes=2, gpus=8, generation="vllm_server"))
    assert (nodes.ranks, nodes.servers) == (8, 8)


@pytest.mark.parametrize(
    ("recipe", "gpu", "accelerator"),
    [
        ("grpo_conservative", "a100-80", "zero2"),
        ("capo_aggressive", "h100", "ddp"),
        ("capo_aggressive", "a100-40", "zero2"),
    ],
)
def test_every_remedy_fits(recipe, gpu, accelerator):
    plan = plan_7b(recipe=recipe, gpu=gpu, accelerator=accelerator)
    assert not plan.fits
    assert plan.remedies
    for remedy in plan.remedies:
        words = dict(word.split("=", 1) for word in shlex.split(remedy))
        machines = {"accelerator": accelerator} | {key.lower(): value for key, value in words.items() if key != "ARGS"}
        machines = {key: int(value) if value.isdigit() else value for key, value in machines.items()}
        assert plan_7b(*words.get("ARGS", "").split(), recipe=recipe, gpu=gpu, **machines).fits, remedy


def test_smaller_memory_never_fits_more():
    largest = [plan_7b(recipe="grpo_conservative", gpu=gpu).largest or 0 for gpu in ("a100-40", "a100-80", "h200")]
    assert largest == sorted(largest)


# --- what a user sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--gpu", "h200"], 0, "it fits; the largest micro-batch"),
        (["--accelerator", "ddp"], 1, "What would fit:"),
        (["--gpu", "a100-40"], 1, "no room for one sequence"),
        (["--scale", "lab"], 0, "1 × cpu, one process, transformers"),
        (["max_steps=10", "--gpus", "8", "per_device_train_batch_size=12"], 0, "8 ranks × 1 × 12"),
        (
            ["--scale", "qwen2.5-math-1.5b", "--generation", "vllm_server", "--server-gpus", "2"],
            0,
            "2 of them for servers",
        ),
    ],
)
def test_the_table(arguments, code, said, capsys):
    assert main(arguments) == code
    text = capsys.readouterr().out
    assert said in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "b300"], "there are h100, h200, a100-80, a100-40, l40s, cpu"),
        (["--gpus", "5"], "cannot be shared by 5 training GPUs: choose GPUS and NODES that give 2, 3, 4, 6"),
        (["--gpus", "8"], 'set ARGS="per_device_train_batch_size=12"'),
        (["per_device_train_batch_size=x"], "per_device_train_batch_size must be a whole number above 0, got 'x'"),
        (["completions_per_step=many"], "completions_per_step must be a whole number above 0, got 'many'"),
        (["--recipe", "cappo"], "there is no recipe 'cappo'"),
        (["--scale", "70b"], "there is no scale '70b'"),
        (["--generation", "sglang"], "there is no generation 'sglang'"),
        (["--accelerator", "zero1"], "ACCELERATOR must be one of zero2, zero3, ddp, fsdp"),
        (["--generation", "vllm_server", "--server-gpus", "4"], "SERVER_GPUS must be 1 to 3 of the 4 GPUs, got 4"),
        (["model_name_or_path=unknown"], "the shape of unknown is not known here"),
        (["--run", "nowhere"], "nowhere has no metrics.jsonl"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, capsys):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_json_says_what_the_table_says(capsys):
    assert main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    plan = plan_7b()
    assert data["step_seconds"]["total"] == pytest.approx(plan.step)
    assert data["memory"]["weights"]["bytes"] == 2 * data["workload"]["shape"]["parameters"]
    assert data["gpu_hours"] == pytest.approx(5 * 100 * 4 * plan.step / 3600)
    assert data["checkpoint_bytes"] / GIB == pytest.approx(16 * 7_615_616_512 / GIB + 4.06, rel=1e-3)


def test_a_runs_seconds_beside_the_estimate(tmp_path, capsys):
    lines = [{"time/total": 100.0, "time/generate": 50.0}] * 2 + [
        {"time/total": t, "time/generate": 1.0} for t in (2, 3, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = measured_seconds(tmp_path)
    assert (found["total"], found["generation"]) == (3, 1)
    main(["--run", str(tmp_path)])
    assert "measured" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
    with pytest.raises(PlanError, match="more than two steps"):
        measured_seconds(tmp_path)


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
