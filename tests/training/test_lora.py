"""LoRA from the command line, by TRL's names: every method on the lab, exact resumption, and what is refused."""

import json
import re
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from open_r1_capo import grpo
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.training.build import build
from open_r1_capo.training.lora import adapters
from test_grpo import FAST, metrics, refused

LORA = ["use_peft=true", "lora_r=4", "lora_alpha=8", "lora_target_modules=[q_proj,v_proj,down_proj]"]


def command(root, policy, recipe, *more):
    fast = [item for item in FAST if not item.startswith("capo.")]
    fast = [item for item in fast if not (item.startswith("learning_rate") and "budget" in recipe)]
    return ["--config-name", recipe, f"output_root={root}", *fast, f"model_name_or_path={policy}", *LORA, *more]


@pytest.mark.parametrize("recipe", ["grpo_aggressive", "drgrpo_aggressive", "reinforce_budget", "grpo_budget"])
def test_it_trains_adapters_alone(tmp_path, lab_policy, recipe):
    assert grpo.main(command(tmp_path, lab_policy, recipe)) == 0
    folder = tmp_path / recipe / "lab" / "seed0"
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "v_proj", "down_proj"}
    assert all(min(tensor.shape) == 4 for tensor in adapter.values())
    assert not list(checkpoint.glob("model*.safetensors"))
    rows = metrics(folder)
    assert max(row["capo/measured_kl"] for row in rows) > 1e-6
    if "budget" in recipe:
        taken = [row["budget/kl"] / row["budget/nats"] for row in rows if row["grad_norm"] > 0]
        assert max(taken) <= 1.5 and max(taken) > 0.5
    base = AutoModelForCausalLM.from_pretrained(lab_policy)
    head = base.get_output_embeddings().weight.clone()
    tuned = PeftModel.from_pretrained(base, checkpoint)
    assert torch.equal(tuned.get_output_embeddings().weight, head)


def test_a_run_resumes_exactly(tmp_path, lab_policy):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for root in (whole, parts):
        assert grpo.main(command(root, lab_policy, "grpo_budget")) == 0
    folder, reference = (root / "grpo_budget" / "lab" / "seed0" for root in (parts, whole))
    (folder / "summary.json").unlink()
    for step in (4, 6):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}")
    assert grpo.main(command(parts, lab_policy, "grpo_budget")) == 0
    ours, theirs = (
        load_file(one / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors") for one in (folder, reference)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(folder) == metrics(reference)


def test_the_mask_asks_for_a_head_that_moves(tmp_path, lab_policy, capsys):
    error = refused(capsys, *command(tmp_path, lab_policy, "capo_aggressive"))
    assert "the LM head is frozen (as under LoRA), but capo.mode=mask" in error
    assert not (tmp_path / "capo_aggressive").exists()
    trained = ["lora_modules_to_save=[lm_head]", "max_steps=2"]
    assert grpo.main(command(tmp_path, lab_policy, "capo_aggressive", *trained)) == 0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lora_target_modules=[q_prj]", "lora_target_modules: the policy has no module q_prj; did you mean q_proj?"),
        ("lora_target_modules=[q_proj,xxxx]", "no module xxxx; its linear layers are down_proj, .*, or all-linear"),
        ("lora_modules_to_save=[head]", "lora_modules_to_save: the policy has no module head; did you mean lm_head?"),
        ("lora_target_modules=[lm_head]", "TRL's loss reads the weight of lm_head .*lora_modules_to_save"),
        ("lora_r=0", "lora_r must be at least 1"),
        ("lora_dropout=1.5", "lora_dropout is a share from 0 to below 1"),
        ("lora_dropout=0.1", "which dropout makes a random one: set disable_dropout=True"),
    ],
)  # fmt: skip
def test_bad_adapters(tmp_path, lab_policy, capsys, override, sentence):
    error = refused(capsys, *command(tmp_path, lab_policy, "grpo_budget", override))
    assert re.search(sentence, error), error
    assert not (tmp_path / "grpo_budget").exists()


def test_every_linear_layer(lab_policy):
    run, _ = build(compose_recipe("grpo_budget", ["use_peft=true", "lora_target_modules=all-linear"]))
    assert adapters(run, str(lab_policy)).target_modules == "all-linear"


def test_adapter_settings_without_adapters_are_refused():
    with pytest.raises(ConfigError, match="lora_r has no effect with use_peft=false"):
        compose_recipe("grpo_budget", ["lora_r=8"])
    with pytest.raises(ConfigError, match="use_dora has no effect with use_peft=false"):
        compose_recipe("grpo_budget", ["use_dora=true"])


@pytest.mark.parametrize("name", ["peft_config", "use_lora", "lora", "peft"])
def test_other_names_for_it(name):
    with pytest.raises(ConfigError, match=f"there is no setting '{name}'; did you mean use_peft?"):
        compose_recipe("grpo_budget", [f"{name}=true"])


def test_without_peft_a_sentence(monkeypatch, lab_policy):
    run, _ = build(compose_recipe("grpo_budget", ["use_peft=true"]))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="use_peft=true needs the package peft, which is not installed: pip install"):
        adapters(run, str(lab_policy))


def test_an_adapter_is_no_model_to_evaluate(tmp_path):
    from open_r1_capo.evaluation import EvalError
    from open_r1_capo.evaluation.model import resolve

    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/base"}))
    with pytest.raises(EvalError, match="LoRA adapters of models/base.*merge_and_unload"):
        resolve(str(tmp_path))


def test_no_plan_for_adapters(capsys):
    from open_r1_capo.capacity.__main__ import main

    assert main(["--recipe", "grpo_budget", "--scale", "qwen2.5-math-7b", "use_peft=true"]) == 2
    assert "leave use_peft out, and take the result as an upper bound" in capsys.readouterr().err
