"""Pretraining of the lab policy: a small Qwen2, from nothing, on the task's noisy mixture of styles.

The last layer is made as heavy as in a large model. Adam moves each weight by about the learning rate, so the change
of a logit grows with the width: at 3584 the last layer dominates a step, at 128 the body does. A final norm weight of
16, with the head's initial weights and its pretraining learning rate divided by 16, restores the balance.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from open_r1_capo.tasks.lab.settings import LabSettings, Mixture
from open_r1_capo.tasks.lab.task import VARIANTS, direct_answer, draw_terms, ramble, worked_solution

IGNORE = -100  # label of a token that carries no loss


def pretraining_text(rng: random.Random, mixture: Mixture) -> tuple[str, str]:
    """Draw one train problem of any variant with a completion of any style: the user's message and the completion."""
    others = [name for name in VARIANTS if name != "base"]
    variant = "base" if rng.random() < mixture.base else rng.choice(others)
    terms = draw_terms(rng, "train", variant)
    style = rng.random()
    if style < mixture.worked:
        completion = worked_solution(terms, rng, mixture.slip, mixture.shortcut, mixture.filler)
    elif style < mixture.worked + mixture.direct:
        completion = direct_answer(terms, rng, mixture.right, mixture.filler)
    else:
        completion = ramble(rng, mixture.filler)
    return VARIANTS[variant].wording(terms), completion


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Use n CPU threads inside, and as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_model(settings: LabSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """Build the untrained policy, in float32 on the CPU; the global random state is left as it was."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_length,
        initializer_range=settings.hidden_size**-0.5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(settings.head_balance)
        model.lm_head.weight.div_(settings.head_balance)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return model


def encode(problem: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Turn one text into token ids, and labels on the completion and its end only."""
    messages = [{"role": "user", "content": problem}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    target = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + target, [IGNORE] * len(prompt) + target


def _batch(
    rng: random.Random, settings: LabSettings, tokenizer: PreTrainedTokenizerBase, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one batch of token ids and labels, padded on the right, both (batch_size, longest)."""
    mixture = settings.mixture_at(step)
    rows = [encode(*pretraining_text(rng, mixture), tokenizer) for _ in range(settings.batch_size)]
    rows = [(ids[: settings.max_length], labels[: settings.max_length]) for ids, labels in rows]
    longest = max(len(ids) for ids, _ in rows)
    ids = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row, _ in rows]
    labels = [row + [IGNORE] * (longest - len(row)) for _, row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def _loss(
    model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Mean cross-entropy over the labelled tokens, weighted by id (vocabulary,); only they go through the head."""
    # Padding on the right needs no attention mask: a causal model never looks there.
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORE
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted], weights)


def _weights(settings: LabSettings, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """The loss's weight of each id, shape (vocabulary,), or None where all are the same."""
    filler = tokenizer.convert_tokens_to_ids(settings.mixture.filler_tokens)
    if not filler:
        return None
    weights = torch.ones(len(tokenizer))
    weights[filler] = settings.filler_weight
    return weights


def _report(step: int, steps: int, loss: torch.Tensor, started: float) -> None:
    """Write progress to stderr: a line that rewrites itself on a terminal, ten lines elsewhere."""
    live, last = sys.stderr.isatty(), step == steps
    if not last and step % (max(1, steps // 100) if live else max(1, steps // 10)):
        return
    elapsed = time.monotonic() - started
    eta = elapsed / step * (steps - step)
    line = f"lab policy: step {step}/{steps}, loss {loss.item():.3f}, {elapsed:.0f} s, {eta:.0f} s to go"
    sys.stderr.write(f"\r{line}   {chr(10) if last else ''}" if live else f"{line}\n")
    sys.stderr.flush()


def pretrain(settings: LabSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """Train the policy from nothing, on the CPU; deterministic, and global random states are left alone."""
    model, rng = build_model(settings, tokenizer, seed), random.Random(f"pretrain/{seed}")
    head = list(model.lm_head.parameters())
    body = [p for name, p in model.named_parameters() if not name.startswith("lm_head.")]
    groups = [
        {"params": body, "lr": settings.learning_rate},
        {"params": head, "lr": settings.learning_rate / settings.head_balance},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    warmup = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * t / settings.steps))
    )
    started, weights = time.monotonic(), _weights(settings, tokenizer)
    with _threads(settings.threads), torch.enable_grad():
        model.train()
        for step in range(1, settings.steps + 1):
            loss = _loss(model, *_batch(rng, settings, tokenizer, step), weights)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            _report(step, settings.steps, loss.detach(), started)
    return model.eval()
