r"""Train a policy with GRPO, Dr.GRPO, REINFORCE or their curvature-aware forms, from a recipe.

    python -m open_r1_capo.grpo --config-name capo_aggressive seed=0 learning_rate=1e-4
    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml src/open_r1_capo/grpo.py \
        --config-name capo_aggressive scale=qwen2.5-math-7b

Exit codes: 0 done; 2 the input cannot be used (one sentence says why, nothing was overwritten); 85 stopped at a
checkpoint by SIGTERM or SIGUSR1, the same command goes on; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import netrc
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig

from open_r1_capo.report import summarise, summary_lines, write_report
from open_r1_capo.runs.folder import RunFolder, RunFolderError, write_atomically
from open_r1_capo.settings.recipes import compose_recipe, known_recipes
from open_r1_capo.settings.run import ConfigError, RunConfig, build, world_size
from open_r1_capo.tasks.data import SYSTEM_PROMPT, DataError, load_problems, to_prompts
from open_r1_capo.tasks.lab.policy import LabError, base_policy, held_out_accuracy, suite_accuracy
from open_r1_capo.tasks.lab.task import problems as lab_problems
from open_r1_capo.tasks.rewards import get_reward_funcs
from open_r1_capo.training.callbacks import RunCallback
from open_r1_capo.training.checkpoint import CheckpointError, check_processes, newest_complete
from open_r1_capo.training.generation.adapter import attach
from open_r1_capo.training.generation.backend import GenerationError
from open_r1_capo.training.generation.choice import backend_for
from open_r1_capo.training.preemption import PREEMPTED, Preempted, Preemption
from open_r1_capo.training.token_records import TokenRecords
from open_r1_capo.training.trainer import CAPOTrainer

USER_ERRORS = (ConfigError, DataError, RunFolderError, CheckpointError, LabError, GenerationError)
Accuracy = Callable[[], dict[str, float]]
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than ulimit -f allows",
}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, train, and turn bad input into one sentence.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m open_r1_capo.grpo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config-name", default="capo_aggressive", help=f"one of {', '.join(known_recipes())}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a field of TRL's GRPOConfig or of ours")
    options = parser.parse_args(argv)
    quiet()
    try:
        with Preemption().listening() as preemption:
            train(compose_recipe(options.config_name, options.overrides), preemption)
    except Preempted as stop:
        say(str(stop))
        return PREEMPTED
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def train(settings: dict[str, Any], preemption: Preemption | None = None) -> None:
    """Run a composed recipe to its end, from wherever an earlier call stopped.

    Args:
        settings: from `compose_recipe`.
        preemption: may stop the run at a checkpoint.
    """
    # --- the recipe --------------------------------------------------------------------------------------------------
    config, args = build(settings)
    rewards = known_rewards(config)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    folder = RunFolder(config.folder(args.seed))
    folder.check(settings, config.overwrite)
    if folder.finished() and not config.overwrite:
        if args.process_index == 0:
            print("\n".join(["this run has ended (OVERWRITE=1 runs it again)", *summary_lines(folder)]))
        return
    try:
        fill(folder, settings, config, args, rewards, preemption)
    finally:
        folder.release()


def fill(
    folder: RunFolder,
    settings: dict[str, Any],
    config: RunConfig,
    args: GRPOConfig,
    rewards: list[Callable],
    preemption: Preemption | None,
) -> None:
    """Train into a run's folder.

    Args:
        folder: the run's own; it stays locked until its owner releases it.
        settings: the resolved recipe.
        config: our settings.
        args: TRL's.
        rewards: reward functions.
        preemption: may stop the run at a checkpoint.
    """
    # --- the policy and its data -------------------------------------------------------------------------------------
    model = str(base_policy(settings=config.lab)) if config.model_name_or_path == "lab" else config.model_name_or_path
    tokenizer = load_tokenizer(model)
    dataset = load_dataset(config, tokenizer, args.seed)

    # --- the folder and the trainer: if it cannot be built, the folder is left as it was -----------------------------
    main_process = args.process_index == 0
    with ExitStack() as undo:
        with args.main_process_first(local=False):
            claim = folder.claim(settings, config.overwrite) if main_process else nullcontext((None, []))
            resume, notes = undo.enter_context(claim)
        if not main_process:
            resume, _ = newest_complete(folder.checkpoints)
        other = check_processes(resume, world_size(), config.allow_other_processes) if resume else None
        tell_wandb(config, args, folder)
        trainer = make_trainer(config, args, rewards, model, tokenizer, dataset)
        accuracy, suite = held_out(config, trainer, tokenizer)
        trainer.add_callback(RunCallback(trainer, folder, accuracy, suite, config.evaluation.every))
        if preemption:
            preemption.watch(trainer)
        before = accuracy() if accuracy else None
    for note in notes:
        say(f"{note}; going on from {resume or 'the beginning'}")
    if other:
        say(other)
    if main_process:
        folder.trim_metrics(int(resume.name.rpartition("-")[2]) if resume else 0)

    # --- training ----------------------------------------------------------------------------------------------------
    if resume:
        say(f"going on from {resume}")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if preemption:
        preemption.check()
    after = accuracy() if accuracy else None  # in every process, as the policy may be in shards
    if not main_process:
        return

    # --- the result --------------------------------------------------------------------------------------------------
    summary = summarise(settings, folder.read_metrics(), before, after)
    write_report(folder, settings, summary)
    write_atomically(folder.summary, json.dumps(summary, indent=2) + "\n")
    print("\n".join(summary_lines(folder)))


def tell_wandb(config: RunConfig, args: GRPOConfig, folder: RunFolder) -> None:
    """Keep wandb's files inside the run's folder, and wandb offline where it has no key.

    Args:
        config: our settings.
        args: TRL's; gets the run's name.
        folder: of the run.
    """
    args.run_name = args.run_name or f"{config.recipe}-{config.scale}-seed{args.seed}"
    os.environ.setdefault("WANDB_DIR", str(folder.path))
    os.environ.setdefault("WANDB_PROJECT", "open-r1-capo")
    os.environ.setdefault("WANDB_RUN_GROUP", args.run_name)  # a run that goes on is a new one to wandb
    if "WANDB_API_KEY" not in os.environ and not logged_in_to_wandb():
        os.environ.setdefault("WANDB_MODE", "offline")


def logged_in_to_wandb() -> bool:
    """Whether `wandb login` has left a key in the user's netrc file."""
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def known_rewards(config: RunConfig) -> list[Callable]:
    """Look the rewards up.

    Args:
        config: our settings.

    Returns:
        The reward functions.

    Raises:
        ConfigError: an unknown name.
    """
    try:
        return get_reward_funcs(config.reward_funcs)
    except ValueError as error:
        raise ConfigError(f"reward_funcs: {error}") from None


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer, the first thing that fails when a model cannot be reached.

    Args:
        model: local folder or hub id.

    Returns:
        The tokenizer, padding on the left.

    Raises:
        ConfigError: the model cannot be reached, or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the model {model} cannot be loaded ({str(error).splitlines()[0]}); put a copy of it on this machine and "
            "set model_name_or_path=<folder>"
        ) from None
    if tokenizer.chat_template is None:
        raise ConfigError(f"the tokenizer of {model} has no chat template, which the prompts need")
    return tokenizer


def load_dataset(config: RunConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Load the problems and build their prompts.

    Args:
        config: our settings.
        tokenizer: measures the prompts.
        seed: of the lab's problems.

    Returns:
        Rows with `prompt` and `solution`, without the prompts that are too long.

    Raises:
        ConfigError: no prompt is short enough.
    """
    data = config.data
    if data.name == "lab" and not data.path:
        problems = Dataset.from_list(lab_problems("train", data.problems, seed=seed, variant=data.variant))
    else:
        columns = {"problem_column": data.problem_column, "answer_column": data.answer_column}
        problems = load_problems(data.name, data.path, config=data.config, split=data.split, **columns)
    rows = to_prompts(problems, SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt)
    if data.max_prompt_tokens is None:
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
) -> CAPOTrainer:
    """Build the trainer.

    Args:
        config: our settings.
        args: TRL's.
        rewards: reward functions.
        model: local folder or hub id.
        tokenizer: of the policy.
        dataset: rows with `prompt` and `solution`.
        kind: the trainer's class.

    Returns:
        The trainer, silent but for its callbacks.

    Raises:
        ConfigError: the model's weights cannot be loaded, or CAPO cannot model its LM head.
    """
    backend = backend_for(args, model, config.folder(args.seed))
    if backend:
        args.use_vllm = False  # TRL would start its own; `attach` sets it again
    try:
        trainer = kind(
            model=model,
            reward_funcs=rewards,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            capo=config.capo,
            advantage_baseline=config.advantage_baseline,
            records=token_records(config, args, tokenizer),
        )
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"the trainer cannot be built: {' '.join(str(error).split())}") from None
    trainer.remove_callback(PrinterCallback)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        say("FSDP is ignored: accelerate shards on GPUs alone, so that every process here holds the whole model")
    if backend:
        attach(trainer, backend)
    return trainer


def held_out(
    config: RunConfig, trainer: CAPOTrainer, tokenizer: PreTrainedTokenizerBase
) -> tuple[Accuracy | None, Accuracy | None]:
    """Build what measures the trainer's policy on held-out lab problems: accuracy and TEST, None where it is off."""
    (reward,) = get_reward_funcs(["accuracy"])
    wanted = config.evaluation
    problems = lab_problems("test", wanted.problems, variant=config.data.variant) if wanted.problems else []

    def measure(function: Callable, what: Any) -> dict[str, Any]:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        length = {"temperature": trainer.temperature, "max_new_tokens": trainer.max_completion_length}
        return function(policy, tokenizer, what, reward, samples=wanted.samples, **length)

    def test() -> dict[str, Any]:
        found = measure(suite_accuracy, wanted.suite)
        return {**found, "over": len(found["tasks"])}

    return (lambda: measure(held_out_accuracy, problems)) if problems else None, test if wanted.suite else None


def token_records(config: RunConfig, args: GRPOConfig, tokenizer: PreTrainedTokenizerBase) -> TokenRecords | None:
    """Where the run keeps its token records; None if it keeps none."""
    if config.token_records == "none":
        return None
    return TokenRecords(config.folder(args.seed) / "tokens", config.token_records, tokenizer)


def explain(error: Exception) -> str | None:
    """Put an error that the user can mend into one sentence; None if it is ours to mend."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    text = str(error)
    for code, what in FULL.items():
        if getattr(error, "errno", None) == code or os.strerror(code) in text:
            return f"{what}: make room, then the same command goes on from the last complete checkpoint"
    # torch keeps the reason to itself: the archive's writer failed, or is not where it should be
    if "PytorchStreamWriter failed" in text or "unexpected pos" in text:
        return explain(OSError(errno.ENOSPC, ""))
    return None


def say(text: str) -> None:
    """Tell the user something once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def quiet() -> None:
    """Keep the libraries' chatter out of the result; warnings that matter are ours to say."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(torch|transformers|trl|accelerate)")
    disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
