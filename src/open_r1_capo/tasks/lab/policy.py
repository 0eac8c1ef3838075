"""The lab policy as a folder: made on first use, kept in a cache, checked each time, and measured.

The folder is an ordinary Hugging Face model (`AutoModelForCausalLM`, `AutoTokenizer`, vLLM). It appears in the cache
by one rename, so that it is there whole or not at all, whatever stops the process that makes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from open_r1_capo.runs.exit import UserError
from open_r1_capo.tasks.lab import pretrain, task, tokenizer
from open_r1_capo.tasks.lab.pretrain import LabSettings

CACHE_VARIABLE = "OPEN_R1_CAPO_CACHE"
MANIFEST = "lab.json"
Reward = Callable[..., list[float | None]]


class LabError(UserError, RuntimeError):
    """The lab policy cannot be made or kept; the message says what to change."""


def cache_key(settings: LabSettings, seed: int) -> str:
    """Name a policy by everything that determines it.

    Args:
        settings: Sizes, schedule and mixture.
        seed: Decides the initial weights and the texts.

    Returns:
        Twenty hexadecimal digits, which also depend on the sources of task, tokenizer and pretraining and on the
        versions of torch and transformers.
    """
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (task, tokenizer, pretrain)]
    facts = [dataclasses.asdict(settings), seed, sources, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def _cache_root(cache_dir: Path | None) -> Path:
    """Give the cache folder: the argument, else the environment's, else one in the user's home."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "open_r1_capo"
    except RuntimeError as error:
        raise LabError(f"no home folder for the lab policy's cache: set {CACHE_VARIABLE} to a folder") from error


def _digests(folder: Path) -> dict[str, str]:
    """Sum up every file of a folder but the manifest."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_sound(folder: Path) -> bool:
    """Say whether a cached policy is whole: every file that was written is there, byte for byte.

    Args:
        folder: A policy's folder; files added later do not matter.

    Returns:
        True when the policy can be used.
    """
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(recorded) and recorded.items() <= _digests(folder).items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _one_maker(lock: Path) -> Iterator[None]:
    """Let one process of this machine make a policy while others wait; where files cannot be locked, all go on."""
    with lock.open("w") as handle:
        try:
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("lab policy: another process is making it, waiting", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # two makers then both work, and the rename still keeps the folder whole
        yield


def _make(folder: Path, settings: LabSettings, seed: int) -> None:
    """Train a policy and move it to its folder in one rename; nothing half-written stays."""
    # The scratch folder comes first: a full or read-only disk should be known before the minutes of training.
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made = scratch / "policy"
        tok = tokenizer.build_tokenizer(settings.max_length, settings.mixture.filler_tokens)
        started = time.process_time()
        pretrain.pretrain(settings, tok, seed).save_pretrained(made)
        tok.save_pretrained(made)
        facts = {"seed": seed, "settings": dataclasses.asdict(settings), "files": _digests(made)}
        record = facts | {"processor_seconds": round(time.process_time() - started)}
        (made / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists() and not is_sound(folder):
            print(f"lab policy: {folder} is damaged, replacing it", file=sys.stderr, flush=True)
            os.replace(folder, scratch / "damaged")
        try:
            os.replace(made, folder)
        except OSError:
            if not is_sound(folder):  # otherwise another process was first: its policy is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def base_policy(seed: int = 0, cache_dir: Path | None = None, settings: LabSettings | None = None) -> Path:
    """Give the folder of the pretrained lab policy, training it first where the cache does not have it.

    Args:
        seed: Decides the initial weights and the texts.
        cache_dir: Cache folder; by default ``$OPEN_R1_CAPO_CACHE``, else ``~/.cache/open_r1_capo``.
        settings: Sizes, schedule and mixture; by default `LabSettings()`, about two minutes on one core.

    Returns:
        A Hugging Face model folder with tokenizer. It is shared: write nothing into it.

    Raises:
        LabError: If the cache cannot be written (full disk, no permission, no home).
    """
    settings = settings or LabSettings()
    root = _cache_root(cache_dir)
    folder = root / f"policy-{cache_key(settings, seed)}"
    if is_sound(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _one_maker(root / f".{folder.name}.lock"):
            if not is_sound(folder):
                _make(folder, settings, seed)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LabError(
            f"cannot keep the lab policy in {root} ({reason}): free some space, or set {CACHE_VARIABLE} to a "
            "folder that can be written and has 10 MB free"
        ) from error
    return folder


def _sample(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, texts: list[str], config: GenerationConfig
) -> tuple[list[str], torch.Tensor]:
    """Complete one batch of user messages; texts, and their lengths with the end token, shape (batch,)."""
    messages = [[{"role": "user", "content": text}] for text in texts]
    prompts = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tok(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = inputs.to(model.device)
    with torch.no_grad():
        ids = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    ended = (ids == tok.eos_token_id).cumsum(dim=1)
    lengths = ((ended == 0).sum(dim=1) + 1).clamp(max=ids.shape[1])
    return tok.batch_decode(ids, skip_special_tokens=True), lengths.cpu()


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


def _group_scores(  # noqa: PLR0913 (the last five are options by name)
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[dict[str, str]],
    reward: Reward,
    *,
    samples: int = 1,
    temperature: float = 0.9,
    max_new_tokens: int = 48,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[list[list[float]], list[int]]:
    """Complete and score problems; the two measurements below take its options.

    Args:
        model: The policy; its mode and torch's random state stay as they were.
        tokenizer: Its tokenizer, with a chat template.
        problems: Rows with ``problem`` and ``answer``.
        reward: Called as ``reward(completions, solution)`` with completions in trl's form, a list of message lists;
            gives a number in [0, 1] for each, or None to leave one out.
        samples: Completions a problem.
        temperature: Of the sampling, over the whole vocabulary; 0 for greedy completions.
        max_new_tokens: Longest completion, in tokens.
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
    completions, lengths = [], []
    with _evaluating(model, seed):
        for start in range(0, len(rows), batch_size):
            batch = [row["problem"] for row in rows[start : start + batch_size]]
            texts, counts = _sample(model, tokenizer, batch, config)
            completions += [[{"role": "assistant", "content": text}] for text in texts]
            lengths += counts.tolist()
    scores = reward(completions, [row["answer"] for row in rows])
    return [[s for s in scores[i : i + samples] if s is not None] for i in range(0, len(rows), samples)], lengths


def _mean(grouped: list[list[float]]) -> tuple[float, float, int]:
    """Mean over problems of their mean score, its standard error from their spread, and how many were scored."""
    means = torch.tensor([sum(group) / len(group) for group in grouped if group], dtype=torch.float64)
    if len(means) == 0:
        raise ValueError("no problem could be scored")
    error = (means.std() / len(means) ** 0.5).item() if len(means) > 1 else float("nan")
    return means.mean().item(), error, len(means)


def held_out_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[dict[str, str]],
    reward: Reward,
    **options: float,
) -> dict[str, float]:
    """Measure how often sampled completions are right.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        problems: Rows with ``problem`` and ``answer``.
        reward: Scores completions.
        **options: As `_group_scores`: ``samples``, ``temperature``, ``max_new_tokens``, ``batch_size``, ``seed``.

    Returns:
        ``accuracy`` (mean over problems), ``standard_error`` (of that mean, from the spread between problems),
        ``n`` (problems counted), ``mean_completion_length`` (tokens, with the end token).

    Raises:
        ValueError: If no problem could be scored.
    """
    grouped, lengths = _group_scores(model, tokenizer, problems, reward, **options)
    accuracy, error, n = _mean(grouped)
    length = sum(lengths) / len(lengths)
    return {"accuracy": accuracy, "standard_error": error, "n": n, "mean_completion_length": length}


def suite_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems_per_variant: int,
    reward: Reward,
    **options: float,
) -> dict[str, float | dict[str, dict[str, float]]]:
    """Measure the lab's TEST: the mean accuracy of the eight held-out variants, all generated together.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        problems_per_variant: Held-out problems of each variant, at least 2 for standard errors.
        reward: Scores completions.
        **options: As `held_out_accuracy`.

    Returns:
        ``test`` (mean of the variants' accuracies), ``test_stderr`` (of that mean, from the spread between the
        problems of a variant) and ``tasks``: for each variant its ``accuracy`` and ``stderr``.

    Raises:
        ValueError: If no problem of a variant could be scored.
    """
    problems = [row for name in task.VARIANTS for row in task.problems("test", problems_per_variant, variant=name)]
    grouped, _ = _group_scores(model, tokenizer, problems, reward, **options)
    tasks = {}
    for i, name in enumerate(task.VARIANTS):
        accuracy, error, _ = _mean(grouped[i * problems_per_variant : (i + 1) * problems_per_variant])
        tasks[name] = {"accuracy": accuracy, "stderr": error}
    return {
        "test": sum(t["accuracy"] for t in tasks.values()) / len(tasks),
        "test_stderr": sum(t["stderr"] ** 2 for t in tasks.values()) ** 0.5 / len(tasks),
        "tasks": tasks,
    }
