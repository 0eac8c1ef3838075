"""The planner: whose shape it plans for, what fits, and what a user sees."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from open_r1_capo.capacity.__main__ import main, measured_seconds
from open_r1_capo.capacity.devices import DEVICES, GIB
from open_r1_capo.capacity.planner import fits, largest_micro_batch, make
from open_r1_capo.capacity.shapes import KNOWN, PlanError, find_shape, from_config
from open_r1_capo.capacity.workload import Machines, read
from shapes import SCALE_7B, TINY, config


def plan_7b(*overrides, recipe="capo_aggressive", gpu="h100", **machines):
    return make(read(recipe, [SCALE_7B, *overrides], Machines(**machines)), DEVICES[gpu])


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*KNOWN.values(), TINY, replace(TINY, tied=True)], ids=lambda s: s.name)
def test_parameters_are_the_models(shape):
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config(shape)).num_parameters() == shape.parameters


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


# --- plans -----------------------------------------------------------------------------------------------------------


def test_the_papers_setting():
    """4 × H100, 24 sequences each, plain generation: the paper's 55.5 of 135.84 s are not fitted, nor are they met."""
    plan = plan_7b("per_device_train_batch_size=24", generation="transformers")
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
    ("micro_batch", "recipe", "gpu", "accelerator"),
    [
        (24, "grpo_conservative", "a100-80", "zero2"),
        (12, "capo_aggressive", "h100", "ddp"),
        (12, "capo_aggressive", "a100-40", "zero2"),
    ],
)
def test_every_remedy_fits(micro_batch, recipe, gpu, accelerator):
    micro_batch = f"per_device_train_batch_size={micro_batch}"
    plan = plan_7b(micro_batch, recipe=recipe, gpu=gpu, accelerator=accelerator)
    assert not plan.fits
    assert plan.remedies
    for remedy in plan.remedies:
        words = dict(word.split("=", 1) for word in shlex.split(remedy))
        machines = {"accelerator": accelerator} | {key.lower(): value for key, value in words.items() if key != "ARGS"}
        machines = {key: int(value) if value.isdigit() else value for key, value in machines.items()}
        assert plan_7b(micro_batch, *words.get("ARGS", "").split(), recipe=recipe, gpu=gpu, **machines).fits, remedy


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
        (["max_steps=10", "--gpus", "8", "per_device_train_batch_size=6"], 0, "8 ranks × 2 × 6"),
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
        (["--gpus", "6"], 'set ARGS="per_device_train_batch_size=8"'),
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
    seconds = [(100.0, 50.0), (100.0, 50.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    lines = [{"step": i, "time/total": t, "time/generate": g} for i, (t, g) in enumerate(seconds, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"st')  # the run goes on
    found = measured_seconds(tmp_path)
    assert (found["total"], found["generation"]) == (3, 1)
    main(["--run", str(tmp_path)])
    assert "measured" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
    with pytest.raises(PlanError, match="more than two steps"):
        measured_seconds(tmp_path)
