"""REINFORCE in a plain PyTorch loop, each step within a KL budget: no learning rate, no trainer.

Run it with a model folder or hub id: python examples/reinforce_loop.py Qwen/Qwen2.5-0.5B-Instruct
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_r1_capo.budget import KLBudget, sampled_kl

PROMPT = [{"role": "user", "content": "Name a colour."}]


def log_probs(model, ids, prompt_length):
    """(B, T), log π of the completion's tokens."""
    logits = model(ids).logits[:, prompt_length - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, prompt_length:, None])[..., 0]


def main(name: str, steps: int = 30, samples: int = 32, length: int = 8) -> list[float]:
    """Reward answers that say blue; returns the mean reward of every step."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    budget = KLBudget(torch.optim.AdamW(model.parameters()), nats=1e-2)
    history = []
    for step in range(steps):
        with torch.no_grad():
            sampling = {"do_sample": True, "top_k": 0, "min_new_tokens": length, "max_new_tokens": length}
            ids = model.generate(**prompt, **sampling, num_return_sequences=samples)
        texts = tokenizer.batch_decode(ids[:, prompt["input_ids"].shape[1] :])
        rewards = torch.tensor([float("blue" in text.lower()) for text in texts])
        now = log_probs(model, ids, prompt["input_ids"].shape[1])
        model.zero_grad()
        (-(rewards - rewards.mean())[:, None] * now).mean().backward()
        old = now.detach()

        @torch.no_grad()
        def kl(old=old, ids=ids):
            return sampled_kl(old, log_probs(model, ids, ids.shape[1] - length)).mean

        taken = budget.step(kl)
        history.append(float(rewards.mean()))
        print(f"step {step}: reward {history[-1]:.2f}, KL {taken.kl:.1e} nats at a rate of {taken.alpha:.1e}")
    return history


if __name__ == "__main__":
    main(sys.argv[1])
