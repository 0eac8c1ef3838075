"""Helpers that build small trainers."""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from open_r1_capo.settings.budget import BudgetConfig
from open_r1_capo.settings.capo import capo_config
from open_r1_capo.tasks.data import to_prompts
from open_r1_capo.tasks.lab.task import problems
from open_r1_capo.training.budget_trainer import BudgetTrainer
from open_r1_capo.training.run_trainer import RunTrainer
from open_r1_capo.training.trainer import CAPOTrainer

PROMPTS = problems("train", 24, seed=3)


def token_reward(completion_ids, **kwargs):
    """A reward that a random policy varies on: how many of its ids are even."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "temperature": 0.9,
        "loss_type": "grpo",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "adamw_torch",
        "seed": 0,
    }
    return GRPOConfig(**{**defaults, **changes})


def build(
    policy,
    tokenizer,
    folder,
    capo=None,
    baseline="group",
    reward=token_reward,
    records=None,
    budget=None,
    optimizer=None,
    peft_config=None,
    share_prompts=False,
    **changes,
):
    """A CAPOTrainer, a RunTrainer with mode off, or TRL's own if `capo` is None, on a fresh copy of the policy."""
    common = {
        "model": AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        "reward_funcs": [reward],
        "args": arguments(folder, **changes),
        "processing_class": tokenizer,
        "train_dataset": to_prompts(Dataset.from_list(PROMPTS), None),
        "peft_config": peft_config,
    }
    if capo is None:
        return GRPOTrainer(**common)
    config = capo_config(**capo)
    common["share_prompts"] = share_prompts
    budget = BudgetConfig(**budget) if budget else None
    if not config.on:
        common |= {"advantage_baseline": baseline, "optimizer": optimizer}
        return BudgetTrainer(**common, budget=budget) if budget else RunTrainer(**common)
    return CAPOTrainer(**common, capo=config, advantage_baseline=baseline, records=records, budget=budget)


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def history(trainer):
    """What was logged of each optimizer step, without the times."""
    return [
        {k: v for k, v in row.items() if "time" not in k and "runtime" not in k and "per_second" not in k}
        for row in trainer.state.log_history
        if "reward" in row
    ]
