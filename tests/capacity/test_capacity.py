"""Capacity: whose shape is counted, what fits and what would, and what a user sees."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from open_r1_capo.capacity import CapacityError
from open_r1_capo.capacity.__main__ import main
from open_r1_capo.capacity.devices import GIB, find_device
from open_r1_capo.capacity.fit import estimate, fits, largest_that_fits
from open_r1_capo.capacity.shapes import KNOWN, find_shape, from_config
from shapes import TINY, config, workload

H100 = find_device("h100")


def estimate_7b(*overrides, recipe="capo_aggressive", gpu="h100", **machines):
    return estimate(workload(recipe, *overrides, **machines), find_device(gpu))


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
    with pytest.raises(CapacityError, match=r"has no config\.json"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(CapacityError, match="does not say the model's shape"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(CapacityError, match="'mamba'"):
        find_shape(str(tmp_path))
    with pytest.raises(CapacityError, match=r"Qwen2\.5-32B"):
        find_shape("org/unheard-of")


def test_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CapacityError, match="does not say the model's shape"):
        find_shape(str(tmp_path))


def test_the_lab_is_measured_by_its_own_settings(tiny_policy):
    """The fixture has the lab's sizes and its tokenizer."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy)
    work = workload("capo_aggressive", "scale=lab", gpus=1, cpu=True)
    assert work.shape.parameters == policy.num_parameters()
    assert (work.prompt_limit, work.completion_limit, work.element) == (16, 32, 4)


# --- what fits -------------------------------------------------------------------------------------------------------


def test_the_papers_setting_fits():
    """4 × H100, 24 sequences each, plain generation."""
    result = estimate_7b("per_device_train_batch_size=24", "generation=transformers")
    assert (result.workload.micro_batch, result.workload.accumulation) == (24, 1)
    assert result.fits


def test_the_largest_micro_batch_is_the_largest():
    work = workload("grpo_conservative")
    largest = largest_that_fits(work, H100)
    larger = next(n for n in range(largest + 1, work.sequences + 1) if work.sequences % n == 0)
    assert fits(work.with_micro_batch(largest), H100)
    assert not fits(work.with_micro_batch(larger), H100)


def test_the_sequences_split_over_more_gpus():
    eight = workload("capo_aggressive", "per_device_train_batch_size=4", gpus=8)
    assert (eight.ranks, eight.micro_batch, eight.accumulation) == (8, 4, 3)
    server = workload("capo_aggressive", "per_device_train_batch_size=16", "generation=vllm_server")
    assert (server.ranks, server.servers, server.completions) == (3, 1, 96)
    nodes = workload("grpo_conservative", "generation=vllm_server", nodes=2, gpus=8)
    assert (nodes.ranks, nodes.servers) == (8, 8)


def test_a_rank_generates_all_its_completions_at_once():
    micro = ["per_device_train_batch_size=6", "generation=transformers"]
    work = workload("grpo_aggressive", *micro)
    assert (work.micro_batch, work.accumulation, work.rollouts) == (6, 4, 24)
    assert workload("grpo_aggressive", *micro, "steps_per_generation=8", "save_steps=8").rollouts == 48


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
    result = estimate_7b(micro_batch, recipe=recipe, gpu=gpu, accelerator=accelerator)
    assert not result.fits
    assert result.remedies
    for remedy in result.remedies:
        words = dict(word.split("=", 1) for word in shlex.split(remedy))
        settings = [micro_batch, *words.pop("ARGS", "").split()]
        settings += [f"generation={words.pop('GENERATION')}"] if "GENERATION" in words else []
        machines = {key.lower(): int(value) if value.isdigit() else value for key, value in words.items()}
        machines = {"accelerator": accelerator} | machines
        assert estimate_7b(*settings, recipe=recipe, gpu=gpu, **machines).fits, remedy


def test_smaller_memory_never_fits_more():
    largest = [estimate_7b(recipe="grpo_conservative", gpu=gpu).largest or 0 for gpu in ("a100-40", "a100-80", "h200")]
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
        (["--gpus", "5"], "is not a multiple of the 5 training processes: choose a number of GPUs that divides it"),
        (["--gpus", "6"], 'set ARGS="per_device_train_batch_size=8"'),
        (["per_device_train_batch_size=x"], "per_device_train_batch_size must be a whole number"),
        (["completions_per_step=many"], "completions_per_step must be a whole number, got 'many'"),
        (["--recipe", "cappo"], "there is no recipe 'cappo'"),
        (["--scale", "70b"], "there is no scale '70b'"),
        (["--generation", "sglang"], "there is no generation 'sglang'"),
        (["--accelerator", "zero1"], "ACCELERATOR must be one of zero2, zero3, ddp, fsdp"),
        (["--generation", "vllm_server", "--server-gpus", "4"], "SERVER_GPUS must be 1 to 3 of the 4 GPUs, got 4"),
        (["model_name_or_path=unknown"], "the shape of unknown is not known here"),
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
    result = estimate_7b()
    assert data["peak"]["bytes"] == result.peak[1] == max(data["phases"].values())
    assert data["memory"]["weights"]["bytes"] == 2 * data["workload"]["shape"]["parameters"]
    assert data["largest_micro_batch"] == result.largest == 24
    assert data["checkpoint_bytes"] / GIB == pytest.approx(16 * 7_615_616_512 / GIB + 4.06, rel=1e-3)
    assert data["checkpoints"] == 10


def test_the_disk_of_all_seeds(capsys):
    assert main(["--seeds", "2", "save_steps=50"]) == 0
    assert "checkpoints: 2 × 117.5 GiB = 235.1 GiB on disk a seed; 2 seeds: 470.2 GiB" in capsys.readouterr().out


def test_machines_are_those_of_the_recipe(capsys):
    """A recipe that trains on the CPU is counted for this machine, any other for four H100."""
    assert main(["--scale", "lab", "use_cpu=false"]) == 0
    assert "4 × h100, zero2, transformers" in capsys.readouterr().out


@pytest.mark.parametrize(("recipe", "accelerator"), [("capo_aggressive", "zero2"), ("grpo_budget", "fsdp")])
def test_the_accelerator_is_that_of_make_train(capsys, recipe, accelerator):
    assert main(["--recipe", recipe, "--scale", "qwen2.5-math-7b", "--gpus", "4", "--gpu", "h100"]) == 0
    assert f"4 × h100, {accelerator}," in capsys.readouterr().out
