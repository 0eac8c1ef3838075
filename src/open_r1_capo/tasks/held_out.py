"""Accuracy of a policy on held-out problems, sampled in this process: one set of problems, or named test sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from open_r1_capo.tasks.data import make_prompt
from open_r1_capo.tasks.source import Problem

Reward = Callable[..., list[float | None]]


def held_out_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    reward: Reward,
    **options: Any,
) -> dict[str, float]:
    """Measure how often sampled completions are right; options as for `_scores`.

    Returns:
        `accuracy` (mean over problems), `standard_error` (of that mean, from the spread between problems), `n`
        (problems counted), `mean_completion_length` (tokens, with the end token).
    """
    scores, lengths = _scores(model, tokenizer, problems, reward, **options)
    accuracy, error, n = _mean(scores)
    length = sum(lengths) / len(lengths)
    return {"accuracy": accuracy, "standard_error": error, "n": n, "mean_completion_length": length}


def suite_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: Mapping[str, list[Problem]],
    reward: Reward,
    **options: Any,
) -> dict[str, float | dict[str, dict[str, float]]]:
    """Measure TEST, the mean accuracy of named test sets, all generated together; options as for `_scores`.

    Returns:
        `test`, `test_stderr` (from the spread between the problems of a set; needs two a set) and `tasks`: the
        `accuracy` and `stderr` of each set.
    """
    problems = [row for rows in tests.values() for row in rows]
    scores, _ = _scores(model, tokenizer, problems, reward, **options)
    tasks, rest = {}, iter(scores)
    for name, rows in tests.items():
        accuracy, error, _ = _mean(list(islice(rest, len(rows))))
        tasks[name] = {"accuracy": accuracy, "stderr": error}
    return {
        "test": sum(t["accuracy"] for t in tasks.values()) / len(tasks),
        "test_stderr": sum(t["stderr"] ** 2 for t in tasks.values()) ** 0.5 / len(tasks),
        "tasks": tasks,
    }


def _scores(  # noqa: PLR0913 (options by name)
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    reward: Reward,
    *,
    system_prompt: str | None = None,
    samples: int = 1,
    temperature: float = 0.9,
    max_new_tokens: int = 48,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[list[list[float]], list[int]]:
    """Sample and score completions; the model's mode and torch's random state stay as they were.

    Args:
        model: The policy.
        tokenizer: With a chat template.
        problems: To complete.
        reward: Called as `reward(completions, answers)`, completions as message lists, and with the problems' other
            columns by name; None leaves one out.
        system_prompt: None or "" sends none.
        samples: Completions a problem.
        temperature: Over the whole vocabulary; 0 for greedy completions.
        max_new_tokens: Longest completion.
        batch_size: Completions generated at once.
        seed: Of the sampling.

    Returns:
        The scores of each problem, without None, and every completion's length.
    """
    # Greedy is said as the best one of one: with do_sample off, the model's own sampling settings raise warnings.
    sampling = {"temperature": temperature, "top_k": 0} if temperature > 0 else {"top_k": 1}
    config = GenerationConfig(
        do_sample=True,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    rows = [row for row in problems for _ in range(samples)]
    prompts = [make_prompt(row["problem"], system_prompt) for row in rows]
    completions, lengths = [], []
    with _evaluating(model, seed):
        for start in range(0, len(rows), batch_size):
            texts, counts = _sample(model, tokenizer, prompts[start : start + batch_size], config)
            completions += [[{"role": "assistant", "content": text}] for text in texts]
            lengths += counts.tolist()
    others = {name: [row[name] for row in rows] for name in rows[0] if name not in ("problem", "answer")}
    scores = reward(completions, [row["answer"] for row in rows], **others)
    return [[s for s in scores[i : i + samples] if s is not None] for i in range(0, len(rows), samples)], lengths


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: list[list[dict]], config: GenerationConfig
) -> tuple[list[str], torch.Tensor]:
    """Complete one batch of conversations; texts, and their lengths with the end token, shape (batch,)."""
    prompts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = inputs.to(model.device)
    with torch.no_grad():
        ids = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    ended = (ids == tokenizer.eos_token_id).cumsum(dim=1)
    lengths = ((ended == 0).sum(dim=1) + 1).clamp(max=ids.shape[1])
    return tokenizer.batch_decode(ids, skip_special_tokens=True), lengths.cpu()


@contextmanager
def _evaluating(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seed torch and set evaluation mode inside; both are as before outside."""
    training, device = model.training, model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def _mean(scores: list[list[float]]) -> tuple[float, float, int]:
    """Mean over problems of their mean score, its standard error, and how many were scored; ValueError if none was."""
    means = torch.tensor([sum(group) / len(group) for group in scores if group], dtype=torch.float64)
    if len(means) == 0:
        raise ValueError("no problem could be scored")
    error = (means.std() / len(means) ** 0.5).item() if len(means) > 1 else float("nan")
    return means.mean().item(), error, len(means)
