"""The same next step under another rule: what would masking have done at each checkpoint of a run?

Resuming is exact, so every arm that starts from a checkpoint sees the completions that the run saw next. Each arm
takes that one step; any difference afterwards comes from its rule.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from open_r1_capo.capo import TokenBatch, TokenSelection
from open_r1_capo.capo.last_layer import RowGradient, merge, row_gradient
from open_r1_capo.capo.steps import SCRATCH_BYTES
from open_r1_capo.runs.checkpoints import step_of
from open_r1_capo.runs.run import Run
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import ConfigError
from open_r1_capo.tasks.held_out import held_out_accuracy
from open_r1_capo.tasks.rewards import get_reward_funcs
from open_r1_capo.tasks.source import problem_source
from open_r1_capo.training.build import build, known_rewards, load_dataset, load_tokenizer, make_trainer, policy_folder
from open_r1_capo.training.trainer import CAPOTrainer
from open_r1_capo.training.update import MicroBatch

# arm → the recipe whose token rule it takes, of the run's base method; None leaves the run's own
ARMS = {"none": None, "mask": "{}_aggressive", "random": "{}_aggressive", "scale": "{}_scale_aggressive"}
RULE = ("mode", "max_policy_shift", "max_objective_shift", "min_objective_shift", "denominator")  # an arm's own
STEP = ("measured_kl", "measured_kl_head", "measured_objective", "rejected_frac", "mean_weight")


def masked_method(settings: dict[str, Any]) -> str:
    """The name in recipes of a run's base method with the mask.

    It goes by what defines the base method, so that methods built on it count, too: REINFORCE subtracts no baseline,
    Dr.GRPO's loss divides by a constant, GRPO does neither.
    """
    if settings.get("advantage_baseline") == "none":
        return "reincapo"
    return "drcapo" if settings.get("loss_type") == "dr_grpo" else "capo"


def shuffled(selection: TokenSelection, moving: Tensor, generator: torch.Generator) -> TokenSelection:
    """Permute the weights of the tokens that have a gradient, so that a random set of the same size is rejected.

    `moving` (N,) bool marks these tokens (A ≠ 0), `generator` is on the CPU. The reasons stay where they were.
    """
    index = moving.nonzero()[:, 0]
    weight = selection.weight.clone()
    weight[index] = selection.weight[index[torch.randperm(len(index), generator=generator).to(index.device)]]
    return replace(selection, weight=weight)


def gradient_split(batches: Sequence[TokenBatch], chosen: Sequence[Tensor]) -> dict[str, float | None]:
    """What the last-layer gradients of chosen tokens add up to, beside those of the others.

    `chosen` holds (N,) bool for each micro-batch of N tokens.

    Returns:
        `tokens`, their number; `norm` and `other_norm`, of the sum Σ A v ⊗ x (Eq. 7) over them and over the others;
        `cosine` of the two; `coherence`, the sum's norm over the sum of the norms (1: they all point the same way).
        None where a norm is 0.
    """
    mine, others = (
        merge([row_gradient(b, rows.to(b.dtype), SCRATCH_BYTES) for b, rows in zip(batches, sets, strict=True)])
        for sets in (chosen, [~rows for rows in chosen])
    )
    norm, other = float(mine.total.norm()), float(others.total.norm())
    alone = sum(float(b.select(rows).gradient_norm().sum()) for b, rows in zip(batches, chosen, strict=True))
    return {
        "tokens": float(sum(int(rows.sum()) for rows in chosen)),
        "norm": norm,
        "other_norm": other,
        "cosine": _dot(mine, others) / (norm * other) if norm * other > 0 else None,
        "coherence": norm / alone if alone > 0 else None,
    }


def _dot(a: RowGradient, b: RowGradient) -> float:
    """The inner product of two sums of rows; only rows that both hold count."""
    shared = torch.isin(a.token_ids, b.token_ids)
    place = torch.searchsorted(b.token_ids, a.token_ids[shared])
    return float((a.total[shared] * b.total[place]).sum())


class OneStepTrainer(CAPOTrainer):
    """Takes one step and keeps its micro-batches."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.micro_batches: list[MicroBatch] = []
        self.add_callback(_StopAfterStep())

    @property
    def policy(self) -> PreTrainedModel:
        """The model as it is now, without wrappers."""
        return self._policy

    def after_step(self) -> None:
        """Keep the micro-batches before the base class drops them."""
        self.micro_batches = list(self.update.micro_batches)
        super().after_step()


class RandomMaskTrainer(OneStepTrainer):
    """Rejects as many tokens as its rule does, but random ones."""

    def select(self, tokens: TokenBatch, log_mass: Tensor, shifts: tuple[Tensor, Tensor]) -> TokenSelection:
        """Select tokens by the rule, then permute the weights."""
        return shuffled(super().select(tokens, log_mass, shifts), tokens.advantages != 0, self.generator())


class _StopAfterStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class Counterfactual:
    """A run and the steps that it might have taken.

    The reward of a step is measured on `problems` training problems with `samples` completions each.

    Raises:
        RunError: the folder holds no run.
        ConfigError: its steps cannot be taken again, or their reward cannot be measured here.
    """

    def __init__(self, folder: Path, problems: int = 200, samples: int = 2):
        self.run, self.samples = Run(folder), samples
        self.settings = self.run.settings
        config, args = build(self.settings)
        data = replace(config.data, problems=problems)
        source = problem_source(data.name, data.path)
        if "problems" not in source.measures or config.capo.mode != "observe":
            raise ConfigError(f"{folder} has no held-out problems or no capo.mode=observe, such as grpo_aggressive")
        self.problems = source.training(data, args.seed).to_list()
        self.model: str | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="counterfactual-")

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints that a step follows, in order; a ConfigError if there are none."""
        last = self.settings["max_steps"]
        checkpoints = [path for path in self.run.checkpoints() if step_of(path) < last]
        if not checkpoints:
            raise ConfigError(f"{self.run.path} has no complete checkpoint: train it with save_steps=5")
        return checkpoints

    def at(self, checkpoint: Path) -> dict[str, Any]:
        """Take every arm's step from one checkpoint.

        Returns:
            `step`, `before` (the checkpoint's own reward, on the same problems with the same random numbers), `arms`
            (what each measured, and its reward after the step), `gradient` (`gradient_split` of the mask's rejected
            tokens and of a random set of the same size), and `agrees`: whether the arm `none` measured the KL that the
            run logged, to the last bit.

        Raises:
            ConfigError: the arms have not seen the same completions, so they cannot be compared.
        """
        before = self._reward(self._trainer("none", model=str(checkpoint)))
        row: dict[str, Any] = {"step": step_of(checkpoint) + 1, "before": before, "arms": {}, "gradient": {}}
        completions = set()
        for arm in ARMS:
            trainer = self.take_step(checkpoint, arm)
            logs = next(entry for entry in reversed(trainer.state.log_history) if "reward" in entry)
            row["arms"][arm] = {name: logs[f"capo/{name}"] for name in STEP} | self._reward(trainer)
            ids = b"".join(one.input_ids.numpy().tobytes() for one in trainer.micro_batches)
            completions.add(hashlib.sha256(ids).hexdigest())
            if arm in ("mask", "random"):
                rejected = [one.by_rule.weight == 0 for one in trainer.micro_batches]
                row["gradient"][arm] = gradient_split([one.tokens for one in trainer.micro_batches], rejected)
            if arm == "none":
                logged = [r.get("capo/measured_kl") for r in self.run.metrics() if r["step"] == row["step"]]
                row["agrees"] = logged == [logs["capo/measured_kl"]]
        if len(completions) > 1:
            raise ConfigError(f"the arms from {checkpoint} have not seen the same completions")
        return row

    def take_step(self, checkpoint: Path, arm: str = "none") -> OneStepTrainer:
        """The trainer after an arm's step from a checkpoint."""
        trainer = self._trainer(arm)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return trainer

    def policy(self, checkpoint: Path) -> PreTrainedModel:
        """The policy of a checkpoint, from which `take_step` starts."""
        return self._trainer("none", model=str(checkpoint)).policy

    def _trainer(self, arm: str, model: str | None = None) -> OneStepTrainer:
        """A trainer with the run's settings and the arm's rule, which writes only temporary files."""
        settings = self.settings | {"save_strategy": "no", "report_to": "none", "token_records": "none"}
        if ARMS[arm]:
            recipe = ARMS[arm].format(masked_method(settings))
            rule = compose_recipe(recipe, [f"scale={settings['scale']}"])["capo"]
            settings["capo"] = settings["capo"] | {name: rule[name] for name in RULE if name in rule}
        config, args = build(settings)
        args.output_dir = self._scratch.name
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        if self.model is None:
            self.model = policy_folder(config)
        tokenizer = load_tokenizer(self.model)
        dataset, rewards = load_dataset(config, tokenizer, args.seed), known_rewards(config)
        kind = RandomMaskTrainer if arm == "random" else OneStepTrainer
        return make_trainer(config, args, rewards, model or self.model, tokenizer, dataset, kind=kind)

    def _reward(self, trainer: CAPOTrainer) -> dict[str, float]:
        """The accuracy of a trainer's policy on the run's training problems, with its standard error."""
        (reward,) = get_reward_funcs(["accuracy"])
        accuracy = held_out_accuracy(
            trainer.policy,
            trainer.processing_class,
            self.problems,
            reward,
            samples=self.samples,
            temperature=trainer.temperature,
            max_new_tokens=trainer.max_completion_length,
        )
        return {"reward": accuracy["accuracy"], "reward_error": accuracy["standard_error"]}


def compare(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Every arm's means over the checkpoints, and its paired differences to the arm `none`.

    Returns:
        arm → name → `mean`, `error` (standard error), `change` and `change_error` (of the difference to `none`).
    """
    arms: dict[str, dict[str, dict[str, float]]] = {}
    for arm in rows[0]["arms"]:
        arms[arm] = {}
        for name in (*STEP, "reward"):
            mean, error = _mean([row["arms"][arm][name] for row in rows])
            change, change_error = _mean([row["arms"][arm][name] - row["arms"]["none"][name] for row in rows])
            arms[arm][name] = {"mean": mean, "error": error, "change": change, "change_error": change_error}
    return arms


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is unknown, which is written 0."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
