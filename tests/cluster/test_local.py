"""Training on this machine: in one process, or in one a GPU."""

import sys

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from open_r1_capo import grpo
from open_r1_capo.cluster import local
from open_r1_capo.cluster.local import GRPO, local_command
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.training import run

SEVEN = "scale=qwen2.5-math-7b"


def test_a_recipe_of_the_cpu_trains_in_this_process():
    settings = compose_recipe("capo_aggressive", ["scale=lab_wide"])
    assert local_command("capo_aggressive", ["scale=lab_wide"], settings, 4) is None


def test_without_gpus_everything_trains_in_this_process():
    assert local_command("capo_aggressive", [SEVEN], compose_recipe("capo_aggressive", [SEVEN]), 0) is None


def test_one_process_a_gpu():
    """accelerate's own parser reads the command, and its configuration file."""
    command = local_command("grpo_aggressive", [SEVEN, "seed=1"], compose_recipe("grpo_aggressive", [SEVEN]), 3)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
    assert (parsed.num_processes, parsed.use_deepspeed, parsed.zero_stage) == (3, True, 2)
    assert parsed.training_script == str(GRPO) == grpo.__file__
    assert parsed.training_script_args == ["--config-name", "grpo_aggressive", SEVEN, "seed=1"]


@pytest.fixture
def started(monkeypatch):
    """What `grpo` does on a machine of two GPUs: replace itself, or train in its own process."""
    calls = []
    for name in local.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local, "gpu_memory", lambda: [1 << 36] * 2)
    monkeypatch.setattr(local.os, "execv", lambda program, words: calls.append(words))
    monkeypatch.setattr(run, "command", lambda recipe, overrides: calls.append([recipe, *overrides]) or 0)
    return calls


def test_grpo_becomes_the_launcher(started):
    grpo.main([SEVEN])
    assert started[0] == local_command("grpo_budget", [SEVEN], compose_recipe("grpo_budget", [SEVEN]), 2)
    assert any(word.endswith("fsdp.yaml") for word in started[0])  # DeepSpeed's step cannot be measured


def test_a_launched_process_trains(started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert grpo.main([SEVEN]) == 0
    assert started == [["grpo_budget", SEVEN]]


@pytest.mark.parametrize("overrides", [[], ["scale=lab_long"]])
def test_the_lab_is_never_launched(started, overrides):
    assert grpo.main(overrides) == 0
    assert started == [["grpo_budget", *overrides]]


def test_bad_input_is_refused_before_a_launch(started, capsys):
    assert grpo.main([SEVEN, "learning_rte=1"]) == 2
    assert not started
    assert "did you mean learning_rate?" in capsys.readouterr().err
