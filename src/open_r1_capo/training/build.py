"""Build what a run needs from its settings: TRL's arguments, policy, problems, trainer, held-out evaluation."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PrinterCallback
from trl import GRPOConfig

from open_r1_capo.settings.run import RunConfig, read
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.tasks.data import SYSTEM_PROMPT, to_prompts, work_offline_if_unreachable
from open_r1_capo.tasks.held_out import held_out_accuracy, suite_accuracy
from open_r1_capo.tasks.rewards import get_reward_funcs
from open_r1_capo.tasks.source import policy_source, problem_source
from open_r1_capo.training.budget_trainer import BudgetTrainer
from open_r1_capo.training.generation.adapter import attach
from open_r1_capo.training.generation.choice import backend_for
from open_r1_capo.training.lora import adapters
from open_r1_capo.training.run_trainer import RunTrainer
from open_r1_capo.training.token_records import TokenRecords
from open_r1_capo.training.trainer import CAPOTrainer

Accuracy = Callable[[], dict[str, float]]
# of a model that has none, such as a base model
PLAIN_TEMPLATE = "{{ bos_token or '' }}{% for turn in messages %}{{ turn['content'] + '\n\n' }}{% endfor %}"


def build(settings: dict[str, Any]) -> tuple[RunConfig, GRPOConfig]:
    """Our settings and TRL's of a composed recipe, for the processes of this launch and for this machine.

    Raises:
        ConfigError: a value of the wrong type or out of range, or a recipe that this machine cannot run.
    """
    config, values = read(settings, world_size())
    check_machine(config, bool(values["use_cpu"]))
    return config, grpo_config(values)


def world_size() -> int:
    """Processes of this launch (torchrun and accelerate set WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_machine(config: RunConfig, use_cpu: bool = False) -> None:
    """Raise ConfigError if this machine or this launch cannot run the recipe."""
    if config.needs_gpu and not use_cpu and not torch.cuda.is_available():
        raise ConfigError(
            f"the scale {config.scale} needs a GPU and this machine has none; here, "
            f"`make train RECIPE={config.recipe} SCALE=lab` runs, SCALE=own trains any small model, and use_cpu=true "
            "bf16=false tries this one all the same"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    for name, on in {"capo.skip_gradient_norm": math.isfinite(config.capo.skip_gradient_norm),
                     f"budget.rule={config.budget.rule}": config.budget.on}.items():  # fmt: skip
        if on:
            raise ConfigError(
                f"{name} cannot stop DeepSpeed's step, which it takes within its backward pass: launch with "
                "--accelerator fsdp or ddp"
            )


def grpo_config(values: dict[str, Any]) -> GRPOConfig:
    """TRL's arguments from the values of `read`; raises ConfigError if TRL refuses them."""
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in values.get("generation_kwargs") or {}:
        if name not in known and not values["use_vllm"]:  # transformers takes any name, and reads those that it knows
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"generation_kwargs.{name} is no setting of transformers' GenerationConfig{hint}")
    try:
        return GRPOConfig(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"TRL refuses these settings: {' '.join(str(error).split())}") from None


def known_rewards(config: RunConfig) -> list[Callable]:
    """The reward functions; raises ConfigError for an unknown name."""
    try:
        return get_reward_funcs(config.reward_funcs)
    except ValueError as error:
        raise ConfigError(f"reward_funcs: {error}") from None


def policy_folder(config: RunConfig) -> str:
    """The folder or hub id of the policy that training starts from; it is made if it has to be."""
    name = config.model_name_or_path
    return policy_source(name).folder(name, config.policy_settings)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id, padding on the left; the first thing to fail if it cannot be reached.

    Raises:
        ConfigError: the model cannot be reached, or has no end-of-text token.
    """
    if not Path(model).is_dir():
        work_offline_if_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    except (OSError, ValueError) as error:
        looks = model.startswith((".", "/", "~")) or model.count("/") > 1
        reason = "there is no such folder" if looks and not Path(model).is_dir() else str(error).splitlines()[0]
        raise ConfigError(
            f"the model {model} cannot be loaded ({reason}); put a copy of it on this machine and "
            "set model_name_or_path=<folder>"
        ) from None
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"the tokenizer of {model} has no end-of-text token (eos_token), with which a completion ends: set it in "
            "the folder's tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        say(f"the tokenizer of {model} has no pad token: its end-of-text token {tokenizer.eos_token} pads")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        say(f"the tokenizer of {model} has no chat template: prompts are the turns' texts, an empty line after each")
    return tokenizer


def load_dataset(config: RunConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Rows with `prompt` and `solution`; where long prompts are left out, ConfigError if no row is left."""
    data = config.data
    rows = to_prompts(problem_source(data.name, data.path).training(data, seed), system_prompt(config))
    if data.max_prompt_tokens is None or data.long_prompts == "cut_left":
        return rows

    def short(row: dict[str, Any]) -> bool:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        return len(ids) <= data.max_prompt_tokens

    kept = rows.filter(short, load_from_cache_file=False)
    if len(kept) == 0:
        raise ConfigError(f"no prompt has at most data.max_prompt_tokens={data.max_prompt_tokens} tokens")
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} prompts are longer than {data.max_prompt_tokens} tokens: left out"
        )
    return kept


def make_trainer(
    config: RunConfig,
    args: GRPOConfig,
    rewards: list[Callable],
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    kind: type[CAPOTrainer] = CAPOTrainer,
) -> RunTrainer:
    """Build the trainer of a model folder or hub id, silent but for its callbacks; `kind` is used where CAPO is on.

    Raises:
        ConfigError: the model's weights cannot be loaded, CAPO cannot model its LM head, or adapters do not fit.
    """
    backend = backend_for(args, model, config.folder(args.seed))
    if backend:
        args.use_vllm = False  # TRL would start its own; `attach` sets it again
    try:
        common = {"model": model, "reward_funcs": rewards, "args": args, "train_dataset": dataset}
        common |= {"processing_class": tokenizer, "advantage_baseline": config.advantage_baseline}
        cut = config.data.max_prompt_tokens if config.data.long_prompts == "cut_left" else None
        common |= {"peft_config": adapters(config, model), "max_prompt_tokens": cut}
        common |= {"share_prompts": config.share_prompts}
        if config.capo.on:
            records = token_records(config, args, tokenizer)
            trainer = kind(**common, capo=config.capo, budget=config.budget, records=records)
        else:
            common |= {"optimizer": config.optimizer}
            trainer = BudgetTrainer(**common, budget=config.budget) if config.budget.on else RunTrainer(**common)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"the trainer cannot be built: {' '.join(str(error).split())}") from None
    _check_tokens(trainer, tokenizer)
    trainer.remove_callback(PrinterCallback)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        say("FSDP is ignored: accelerate shards on GPUs alone, so that every process here holds the whole model")
    if backend:
        attach(trainer, backend)
    return trainer


def _check_tokens(trainer: RunTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError if the tokenizer's own tokens are none of the model's."""
    rows = trainer.model.get_input_embeddings().num_embeddings
    beyond = [t for t in (tokenizer.pad_token, tokenizer.eos_token) if tokenizer.convert_tokens_to_ids(t) >= rows]
    if beyond:
        raise ConfigError(
            f"the token {beyond[0]} of the tokenizer is not in the model's vocabulary of {rows}: name another one in "
            "the folder's tokenizer_config.json"
        )


def system_prompt(config: RunConfig) -> str:
    """What the system turn of every prompt says; empty for none."""
    return SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt


def held_out(
    config: RunConfig, trainer: RunTrainer, tokenizer: PreTrainedTokenizerBase
) -> tuple[Accuracy | None, Accuracy | None]:
    """Functions that measure the trainer's policy on held-out problems: accuracy and TEST, None where it is off."""
    (reward,) = get_reward_funcs(["accuracy"])
    wanted, source = config.evaluation, problem_source(config.data.name)

    def measure(function: Callable, problems: Any) -> dict[str, Any]:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        options = {"samples": wanted.samples, "system_prompt": system_prompt(config)}
        sampler = trainer.args.generation_kwargs or {}  # may sample at another temperature than the loss takes
        options |= {
            "temperature": sampler.get("temperature", trainer.temperature),
            "max_new_tokens": trainer.max_completion_length,
        }
        return function(policy, tokenizer, problems, reward, **options)

    problems = source.held_out(config.data, wanted.problems) if wanted.problems else []
    tests = source.suite(wanted.suite) if wanted.suite else {}
    return (
        (lambda: measure(held_out_accuracy, problems)) if problems else None,
        (lambda: measure(suite_accuracy, tests) | {"over": len(tests)}) if tests else None,
    )


def token_records(config: RunConfig, args: GRPOConfig, tokenizer: PreTrainedTokenizerBase) -> TokenRecords | None:
    """Where the run keeps its token records; None if it keeps none."""
    if config.token_records == "none":
        return None
    return TokenRecords(config.folder(args.seed) / "tokens", config.token_records, tokenizer)


def say(text: str) -> None:
    """Tell the user something once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
