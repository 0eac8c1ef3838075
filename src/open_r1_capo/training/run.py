"""One run of a recipe, from top to bottom: settings, policy and problems, folder, training, result."""

from __future__ import annotations

import errno
import json
import logging
import netrc
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig

from open_r1_capo.report import write_report
from open_r1_capo.runs.checkpoints import check_processes, newest_complete, step_of
from open_r1_capo.runs.exit import PREEMPTED, UserError, run_cli
from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.runs.run import write_atomically
from open_r1_capo.runs.summary import summarise, summary_lines
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import RunConfig, pin_policy, read
from open_r1_capo.training.build import (
    build,
    held_out,
    known_rewards,
    load_dataset,
    load_tokenizer,
    make_trainer,
    policy_folder,
    say,
    world_size,
)
from open_r1_capo.training.callbacks import RunCallback
from open_r1_capo.training.disk import too_small
from open_r1_capo.training.machine import choices, fit
from open_r1_capo.training.preemption import Preempted, Preemption

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than ulimit -f allows",
}


def command(recipe: str, overrides: Sequence[str]) -> int:
    """Train a recipe to its end, from wherever an earlier call stopped.

    Returns:
        The exit code: 0 done, 2 bad input (one sentence on stderr), 85 stopped at a checkpoint, 130 interrupted.
    """
    quiet()

    def work() -> int:
        try:
            with Preemption().listening() as preemption:
                train(compose_recipe(recipe, list(overrides)), preemption)
        except Preempted as stop:
            say(str(stop))
            return PREEMPTED
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            raise UserError(sentence) from None
        return 0

    return run_cli(work, "interrupted; run the same command to resume from the last checkpoint")


def train(settings: dict[str, Any], preemption: Preemption | None = None) -> None:
    """Run a composed recipe to its end, from wherever an earlier call stopped; `preemption` may stop it again."""
    # --- the recipe --------------------------------------------------------------------------------------------------
    settings, memory = fit(settings, world_size())
    config, args = build(settings)
    rewards = known_rewards(config)
    settings = pin_policy(settings)  # after all that can be refused at once: a policy may have to be downloaded
    config, _ = read(settings, world_size())
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    folder = RunFolder(config.folder(args.seed))
    folder.check(settings, config.overwrite)
    if folder.summary and not config.overwrite:
        if args.process_index == 0:
            print("\n".join(["this run has ended (OVERWRITE=1 runs it again)", *summary_lines(folder)]))
        return
    try:
        fill(folder, settings, config, args, rewards, preemption, memory=memory)
    finally:
        folder.release()


def fill(
    folder: RunFolder,
    settings: dict[str, Any],
    config: RunConfig,
    args: GRPOConfig,
    rewards: list[Callable],
    preemption: Preemption | None,
    *,
    memory: str = "",
) -> None:
    """Train into a run's folder, which stays locked until its owner releases it; `memory` is a word of `fit`."""
    # --- the policy and its data -------------------------------------------------------------------------------------
    model = policy_folder(config)
    tokenizer = load_tokenizer(model)
    dataset = load_dataset(config, tokenizer, args.seed)
    if config.fit_machine:
        say("\n".join(["chosen, with what changes it:", *choices(config, args, dataset.info.description, memory)]))

    # --- the folder and the trainer: if it cannot be built, the folder is left as it was -----------------------------
    main_process = args.process_index == 0
    with ExitStack() as undo:
        with args.main_process_first(local=False):
            claim = folder.claim(settings, config.overwrite) if main_process else nullcontext((None, []))
            resume, notes = undo.enter_context(claim)
        if not main_process:
            resume, _ = newest_complete(folder.checkpoint_folder)
        other = check_processes(resume, world_size(), config.allow_other_processes) if resume else None
        configure_wandb(config, args, folder)
        trainer = make_trainer(config, args, rewards, model, tokenizer, dataset)
        accuracy, suite = held_out(config, trainer, tokenizer)
        trainer.add_callback(RunCallback(trainer, folder, accuracy, suite, config.evaluation.every))
        if preemption:
            preemption.watch(trainer)
        before = accuracy() if accuracy else None
    for note in notes:
        say(f"{note}; resuming from {resume or 'the beginning'}")
    if other:
        say(other)
    if main_process:
        folder.trim_metrics(step_of(resume) if resume else 0)

    if warning := too_small(trainer.model, args, config.capo.on, folder.path):
        say(warning)

    # --- training ----------------------------------------------------------------------------------------------------
    if resume:
        say(f"resuming from {resume}")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if preemption:
        preemption.check()
    after = accuracy() if accuracy else None  # in every process, as the policy may be in shards
    if not main_process:
        return

    # --- the result --------------------------------------------------------------------------------------------------
    summary = summarise(settings, folder.metrics(), before, after)
    write_report(folder, summary)
    write_atomically(folder.summary_file, json.dumps(summary, indent=2) + "\n")
    print("\n".join(summary_lines(folder)))


def configure_wandb(config: RunConfig, args: GRPOConfig, folder: RunFolder) -> None:
    """Keep wandb's files inside the run's folder, and wandb offline where it has no key."""
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


def explain(error: Exception) -> str | None:
    """Return a one-line message for user-fixable errors, or None for bugs (which are re-raised)."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    for code, what in FULL.items():
        if getattr(error, "errno", None) == code or os.strerror(code) in text:
            return f"{what}: free some space, then run the same command to resume from the last complete checkpoint"
    # torch keeps the reason to itself: the archive's writer failed, or is not where it should be
    if "PytorchStreamWriter failed" in text or "unexpected pos" in text:
        return explain(OSError(errno.ENOSPC, ""))
    return None


def quiet() -> None:
    """Silence the libraries; this package prints the warnings that matter."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(torch|transformers|trl|accelerate)")
    disable_progress_bars()
