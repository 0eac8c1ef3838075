"""A cold start: TRL's `SFTTrainer` on worked solutions, for tasks of which the policy has none right.

The result is an ordinary Hugging Face folder, which `model_name_or_path=` takes. Its name holds a key of everything
that determines it, so that the same command finds it made. It appears by one rename: a run that was stopped leaves
nothing, and starts again. One process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from open_r1_capo.runs.exit import UserError, run_cli
from open_r1_capo.runs.summary import duration
from open_r1_capo.settings.run import policy_settings
from open_r1_capo.settings.sft import SFTRun, compose_sft, read_sft
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.tasks.data import make_prompt
from open_r1_capo.tasks.held_out import held_out_accuracy
from open_r1_capo.tasks.rewards import accuracy_reward
from open_r1_capo.tasks.source import Problem, policy_source, problem_source
from open_r1_capo.training.build import load_tokenizer, system_prompt
from open_r1_capo.training.callbacks import show
from open_r1_capo.training.run import explain, quiet

RESULT = "sft.json"  # in the folder, beside the model's files
PLACE = ("output_root", "overwrite")  # settings that do not change the result


def command(name: str, overrides: list[str]) -> int:
    """Make the policy of a recipe, or say where it is; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    quiet()

    def work() -> None:
        try:
            print("\n".join(result_lines(train(compose_sft(name, overrides)))))
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            raise UserError(sentence) from None

    return run_cli(work)


def train(settings: dict[str, Any]) -> Path:
    """Train a composed recipe unless its result is there; returns the folder."""
    config, values = read_sft(settings)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    name = config.model_name_or_path
    model = policy_source(name).folder(name, policy_settings(name, {}))
    tokenizer = load_tokenizer(model)
    source = problem_source(config.data.name, config.data.path)
    rows, tests = source.worked(config.data, values["seed"], config.evaluation.problems)
    key = result_key(settings, model, rows)
    folder = Path(config.output_root) / f"{config.recipe}-{key}"
    if (folder / RESULT).is_file() and not config.overwrite:
        return folder
    trainer = build(config, values, model, tokenizer, rows, folder)
    before = accuracy(config, trainer, tokenizer, tests)
    started = time.time()
    trainer.train()
    facts = {"settings": settings, "policy": model, "solutions": len(rows), "seconds": round(time.time() - started)}
    facts |= {"before": before, "after": accuracy(config, trainer, tokenizer, tests), "versions": versions()}
    keep(trainer, tokenizer, facts, folder)
    return folder


def build(
    config: SFTRun,
    values: dict[str, Any],
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Problem],
    folder: Path,
) -> SFTTrainer:
    """The trainer of a model folder or hub id, silent but for its progress line; the loss is that of the solutions.

    Raises:
        ConfigError: TRL refuses the settings, or the model's weights cannot be loaded.
    """
    prompts = [make_prompt(row["problem"], system_prompt(config)) for row in rows]
    completions = [[{"role": "assistant", "content": row["solution"]}] for row in rows]
    table = Dataset.from_dict({"prompt": prompts, "completion": completions})
    try:
        args = SFTConfig(**values, output_dir=str(folder), save_strategy="no")
        trainer = SFTTrainer(model=model, args=args, train_dataset=table, processing_class=tokenizer)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"the trainer cannot be built: {' '.join(str(error).split())}") from None
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    return trainer


def accuracy(
    config: SFTRun, trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, tests: list[Problem]
) -> dict[str, float] | None:
    """The held-out accuracy of the trainer's policy; None without held-out problems."""
    if not tests:
        return None
    with trainer.accelerator.autocast():
        return held_out_accuracy(
            trainer.model,
            tokenizer,
            tests,
            accuracy_reward,
            system_prompt=system_prompt(config),
            samples=config.evaluation.samples,
            temperature=config.temperature,
            max_new_tokens=config.max_completion_length,
        )


def result_key(settings: dict[str, Any], model: str, rows: list[Problem]) -> str:
    """Ten hex digits of everything that determines the result: settings, policy, solutions, versions."""
    chosen = {name: value for name, value in settings.items() if name not in (*PLACE, "model_name_or_path")}
    facts = [chosen, policy_digest(model), rows, versions()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]


def policy_digest(model: str) -> str:
    """Of a folder's files, weights and tokenizer; of a hub id, the id."""
    folder, digest = Path(model), hashlib.sha256(b"")
    if not folder.is_dir():
        return model
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of the libraries that train."""
    return {module.__name__: module.__version__ for module in (torch, transformers, trl)}


def keep(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any], folder: Path) -> None:
    """Write the policy and its facts to a scratch folder, and move that into place in one rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made = scratch / "policy"
        trainer.save_model(str(made))
        tokenizer.save_pretrained(made)
        (made / RESULT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, scratch / "older")
        os.replace(made, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def result_lines(folder: Path) -> list[str]:
    """What the user is told about a result."""
    facts = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    lines = [f"{facts['solutions']} worked solutions in {duration(facts['seconds'])}"]
    if facts["before"]:
        before, after = (
            f"{facts[when]['accuracy']:.3f} ± {facts[when]['standard_error']:.3f} "
            f"({facts[when]['mean_completion_length']:.0f} tokens)"
            for when in ("before", "after")
        )
        lines.append(f"held-out accuracy {before} before, {after} after, {facts['after']['n']} problems")
    return [*lines, f"policy: model_name_or_path={folder}"]


class Progress(TrainerCallback):
    """One line: step, loss, remaining time."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.start = time.time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the step's loss; the last message of the trainer has none."""
        if logs and "loss" in logs:
            left = (time.time() - self.start) / state.global_step * (state.max_steps - state.global_step)
            line = f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}  ETA {duration(left)}"
            show(line, last=state.global_step == state.max_steps)
