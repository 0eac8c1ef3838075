"""GRPO with a KL budget instead of a learning rate: one line on TRL's own trainer.

Run it with a model folder or hub id: python examples/trl_budget.py Qwen/Qwen2.5-0.5B-Instruct
The word lora after it trains LoRA adapters (pip install peft).
"""

import random
import re
import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from open_r1_capo.training.kl_callback import KLBudgetCallback


def problems(count: int) -> Dataset:
    """Products of two numbers up to 12."""
    rng = random.Random(0)
    pairs = [(rng.randint(2, 12), rng.randint(2, 12)) for _ in range(count)]
    prompts = [[{"role": "user", "content": f"What is {a} * {b}? Answer with the number."}] for a, b in pairs]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(a * b) for a, b in pairs]})


def correct(completions, answer, **kwargs):
    """1 for a completion whose last number is the answer."""
    numbers = [re.findall(r"\d+", completion[0]["content"]) for completion in completions]
    return [float(found[-1:] == [right]) for found, right in zip(numbers, answer, strict=True)]


def main(model: str, lora: bool = False, **changes) -> GRPOTrainer:
    """Train; returns the trainer."""
    peft = None
    if lora:
        from peft import LoraConfig

        peft = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    options = {"output_dir": "outputs/trl_budget", "max_steps": 50, "per_device_train_batch_size": 32}
    options |= {"max_completion_length": 48, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    args = GRPOConfig(**(options | changes))
    trainer = GRPOTrainer(model, correct, args, train_dataset=problems(500), peft_config=peft)
    trainer.add_callback(KLBudgetCallback(entropy_share=0.003))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], lora="lora" in sys.argv[2:])
