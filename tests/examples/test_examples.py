"""The examples run, on a tiny policy, and keep their budgets."""

from pathlib import Path

import pytest
import torch

from scripts import load

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trl_budget(tiny_policy, tmp_path, lora):
    if lora:
        pytest.importorskip("peft")
    changes = {"output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True}
    changes |= {"bf16": False, "max_completion_length": 6, "gradient_checkpointing": False, "disable_tqdm": True}
    trainer = load("examples/trl_budget.py").main(str(tiny_policy), lora, **changes)
    rows = [row for row in trainer.state.log_history if "budget/kl" in row]
    assert len(rows) == 3
    assert all(row["budget/kl"] <= 1.5 * row["budget/nats"] for row in rows)


def test_reinforce_loop(tiny_policy, capsys):
    torch.manual_seed(0)
    history = load("examples/reinforce_loop.py").main(str(tiny_policy), steps=3, samples=8, length=4)
    assert len(history) == 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(float(line.split("KL ")[1].split()[0]) <= 1.5e-2 for line in lines)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.*")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 60
