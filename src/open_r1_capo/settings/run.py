"""Typed settings: a composed recipe becomes `RunConfig` (ours) and TRL's `GRPOConfig`, every range checked.

A recipe's keys are flat and named as TRL's fields; `capo.*`, `data.*` and `evaluation.*` are ours. Whatever is of
the wrong type or out of range ends in one `ConfigError`, before anything is written.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from trl import GRPOConfig

from open_r1_capo.settings.budget import BudgetConfig
from open_r1_capo.settings.capo import CAPOConfig, ConfigError, capo_config, capo_keys
from open_r1_capo.tasks.lab.pretrain import LabSettings
from open_r1_capo.tasks.lab.task import VARIANTS, Mixture


@dataclass
class DataConfig:
    """Where the problems come from.

    Attributes:
        name: `lab`, a named data set of `open_r1_capo.tasks.data`, or any hub data set.
        path: a local JSONL or Parquet file or folder, instead of the hub.
        config: the hub data set's configuration.
        split: its split.
        problem_column: column of the problem text; null finds it.
        answer_column: column of the gold answer; null finds it.
        max_prompt_tokens: longer prompts are left out (Table 2: 512); null keeps all.
        problems: how many problems the lab makes.
        variant: which of the lab's eight variants they are, in training and in `evaluation.problems`.
    """

    name: str | None = None
    path: str | None = None
    config: str | None = None
    split: str = "train"
    problem_column: str | None = None
    answer_column: str | None = None
    max_prompt_tokens: int | None = 512
    problems: int = 2000
    variant: str = "base"

    def __post_init__(self):
        """Check ranges.

        Raises:
            ConfigError: naming the key, its value and what it may be.
        """
        _at_least(1, {"data.problems": self.problems, "data.max_prompt_tokens": self.max_prompt_tokens})
        if self.variant not in VARIANTS:
            raise ConfigError(f"data.variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")


@dataclass
class EvaluationConfig:
    """The held-out accuracy of the lab policy: before training, at every checkpoint, and at the end.

    Attributes:
        problems: how many held-out problems; 0 is off (other policies are measured by `make eval`).
        samples: completions a problem.
        suite: how many held-out problems of each of the lab's eight variants: their mean is TEST, written to
            eval.jsonl every `evaluation.every` steps; 0 is off.
        every: optimizer steps between two measurements of TEST (App. G: 10).
    """

    problems: int = 0
    samples: int = 1
    suite: int = 0
    every: int = 10

    def __post_init__(self):
        """Check ranges.

        Raises:
            ConfigError: naming the key, its value and what it may be.
        """
        _at_least(0, {"evaluation.problems": self.problems, "evaluation.suite": self.suite})
        _at_least(1, {"evaluation.samples": self.samples, "evaluation.every": self.every})


@dataclass
class RunConfig:
    """Everything that is not TRL's: which run this is and what surrounds the trainer.

    Attributes:
        recipe: the recipe's name.
        method: the group's name.
        regime: the group's name.
        scale: the group's name.
        generation: the group's name.
        model_name_or_path: a local folder or hub id; `lab` trains the lab's base policy first.
        completions_per_step: completions of one optimizer step over all ranks; sets TRL's gradient accumulation.
        advantage_baseline: `group` subtracts the group's mean reward, `none` is REINFORCE on the reward itself.
        reward_funcs: names of `open_r1_capo.tasks.rewards`.
        system_prompt: null is the default of `open_r1_capo.tasks.data`; an empty string sends none.
        num_threads: CPU threads of torch; null leaves torch's choice.
        needs_gpu: refuse to start without a CUDA device.
        output_root: the run's folder is <output_root>/<recipe>[,<variant>]/<scale>/seed<seed>.
        variant: a name for what was changed in the recipe, such as `learning_rate=0.0004`.
        overwrite: throw an older run of the same folder away.
        allow_other_processes: go on with another number of processes, though not exactly.
        token_records: what became of each token is kept of the `notable` steps, of `all`, or of `none`.
        capo: see `CAPOConfig`.
        budget: see `BudgetConfig`.
        data: see `DataConfig`.
        evaluation: see `EvaluationConfig`.
        lab: see `LabSettings`; which policy model_name_or_path=lab makes.
    """

    recipe: str
    method: str
    regime: str
    scale: str
    model_name_or_path: str
    completions_per_step: int
    generation: str = "transformers"
    advantage_baseline: str = "group"
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy"])
    system_prompt: str | None = None
    num_threads: int | None = None
    needs_gpu: bool = False
    output_root: str = "outputs"
    variant: str = ""
    overwrite: bool = False
    allow_other_processes: bool = False
    token_records: str = "notable"
    capo: CAPOConfig = field(default_factory=CAPOConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    lab: LabSettings = field(default_factory=LabSettings)

    def __post_init__(self):
        """Check choices and ranges.

        Raises:
            ConfigError: naming the key, its value and what it may be.
        """
        if self.advantage_baseline not in ("group", "none"):
            raise ConfigError(f"advantage_baseline must be 'group' or 'none', got {self.advantage_baseline!r}")
        if self.token_records not in ("notable", "all", "none"):
            raise ConfigError(f"token_records must be one of notable, all, none, got {self.token_records!r}")
        _at_least(1, {"completions_per_step": self.completions_per_step, "num_threads": self.num_threads})
        for name in ("problems", "suite"):
            if getattr(self.evaluation, name) and self.data.name != "lab":
                raise ConfigError(f"evaluation.{name} measures the lab's own problems: set it to 0 and use make eval")
        if "/" in self.variant:
            raise ConfigError(f"variant is a part of a folder's name and has no '/', got {self.variant!r}")
        if self.budget.on and not self.capo.on:
            raise ConfigError("budget.rule needs the step's tokens: use capo.mode=observe, which changes nothing else")
        if self.budget.on and self.capo.step.acts:
            raise ConfigError("budget.rule measures each step, capo.step_policy_shift predicts it: leave one out")
        if not self.reward_funcs:
            raise ConfigError("reward_funcs is empty: name at least one reward, for example reward_funcs=[accuracy]")

    def folder(self, seed: int) -> Path:
        """The run's own folder."""
        name = f"{self.recipe},{self.variant}" if self.variant else self.recipe
        return Path(self.output_root) / name / self.scale / f"seed{seed}"


NESTED: dict[str, type] = {
    "budget": BudgetConfig,
    "data": DataConfig,
    "evaluation": EvaluationConfig,
    "lab": LabSettings,
}
KEPT_LOSSES = ("grpo", "dr_grpo", "bnpo")  # whose token count is known within the micro-batch
TRL_CHOICES = {  # which TRL checks when the first batch has been generated
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"),
}
TRL_FIELDS = {f.name: f for f in dataclasses.fields(GRPOConfig)}
OURS = {f.name for f in dataclasses.fields(RunConfig)} - set(NESTED) - {"capo"}


def build(settings: dict[str, Any]) -> tuple[RunConfig, GRPOConfig]:
    """Typed settings of a composed recipe.

    Args:
        settings: from `compose_recipe`.

    Returns:
        Our settings and TRL's, with the batch arithmetic done for the processes of this launch.

    Raises:
        ConfigError: a value of the wrong type or out of range, or a scale that this machine cannot run.
    """
    ours = {key: value for key, value in settings.items() if key in OURS}
    nested = {key: kind(**_typed(kind, key, settings.get(key))) for key, kind in NESTED.items() if key != "lab"}
    nested["capo"] = capo_config(**_typed_capo(settings.get("capo")))
    nested["lab"] = lab_settings(settings.get("lab"), settings.get("model_name_or_path"))
    missing = [key for key in ("model_name_or_path", "completions_per_step") if settings.get(key) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is not set")
    run = RunConfig(**_typed(RunConfig, "", ours), **nested)
    if run.needs_gpu and not torch.cuda.is_available():
        raise ConfigError(
            f"the scale {run.scale} needs a GPU and this machine has none; here, "
            f"`make train RECIPE={run.recipe} SCALE=lab` runs"
        )
    trl = _typed(GRPOConfig, "", {key: value for key, value in settings.items() if key in TRL_FIELDS})
    folder = run.folder(trl.get("seed", 42))
    trl |= _micro_batches(run, trl) | {"output_dir": str(folder / "checkpoints")}
    _check_training(run, trl)
    _check_batch(run, trl)
    try:
        args = GRPOConfig(**trl)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"TRL refuses these settings: {' '.join(str(error).split())}") from None
    return run, args


def world_size() -> int:
    """Processes of this launch (torchrun and accelerate set WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _at_least(low: int, values: dict[str, int | None]) -> None:
    for name, value in values.items():
        if value is not None and value < low:
            raise ConfigError(f"{name} must be at least {low}, got {value}")


def _typed(kind: type, prefix: str, values: dict[str, Any] | None) -> dict[str, Any]:
    """Convert values to their field's annotated type, and refuse what is of another kind."""
    if not isinstance(values, dict | None):
        raise ConfigError(f"{prefix} is a group of settings, not a value: write {prefix}.<key>={values}")
    hints = get_type_hints(kind)
    return {
        key: _convert(f"{prefix}.{key}" if prefix else key, value, hints[key]) for key, value in (values or {}).items()
    }


def _typed_capo(values: dict[str, Any] | None) -> dict[str, Any]:
    """Convert the group `capo`, whose settings are declared by the rules' classes."""
    if not isinstance(values, dict | None):
        raise ConfigError(f"capo is a group of settings, not a value: write capo.<key>={values}")
    hints = {key: str if key == "step_rule" else get_type_hints(kind)[key] for key, kind in capo_keys().items()}
    return {key: _convert(f"capo.{key}", value, hints[key]) for key, value in (values or {}).items()}


def lab_settings(values: dict[str, Any] | None, model: str | None = "lab") -> LabSettings:
    """The lab policy's settings, which are refused where another policy is trained.

    Args:
        values: the group `lab` of a recipe; None is empty.
        model: the recipe's `model_name_or_path`.

    Returns:
        The settings, with the types that the policy's cache knows them by.

    Raises:
        ConfigError: a value of the wrong type or out of range, or one that nothing reads.
    """
    given = _typed(LabSettings, "lab", values)
    if given and model != "lab":
        raise ConfigError(f"lab.{next(iter(given))} has no effect with model_name_or_path={model}: set that to lab")
    mixture = _typed(Mixture, "lab.mixture", given.pop("mixture", None))
    group = "lab.mixture"
    try:
        given["mixture"], group = Mixture(**mixture), "lab"
        return LabSettings(**given)
    except ValueError as error:
        raise ConfigError(f"{group}.{error}") from None


def _convert(name: str, value: Any, hint: Any) -> Any:
    """One value as its annotation wants it; annotations beyond numbers, text and lists are left to their owner."""
    options = [getattr(option, "__origin__", option) for option in getattr(hint, "__args__", ()) or (hint,)]
    options = [list] if getattr(hint, "__origin__", None) is list else options
    if value is None and (type(None) in options or hint is Any):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        value = float(value)
    if isinstance(value, str) and list in options and str not in options:
        value = [value]
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    if not set(options) <= {*simple, type(None)}:
        return value
    fits = any(isinstance(value, o) and not (isinstance(value, bool) and o is not bool) for o in options)
    if not fits:
        wanted = "a number" if {int, float} <= set(options) else simple[next(o for o in options if o in simple)]
        shown = "null" if value is None else repr(value)
        raise ConfigError(f"{name} must be {wanted}, got {shown}")
    return value


def _micro_batches(run: RunConfig, trl: dict[str, Any]) -> dict[str, int]:
    """Split `completions_per_step` over processes, and either into given micro-batches or a given number of them."""
    given = "gradient_accumulation_steps" if "gradient_accumulation_steps" in trl else "per_device_train_batch_size"
    other = {"gradient_accumulation_steps": "per_device_train_batch_size"}.get(given, "gradient_accumulation_steps")
    if given in trl and other in trl and trl[given] * trl[other] * world_size() != run.completions_per_step:
        raise ConfigError(
            f"{given} ({trl[given]}) × {other} ({trl[other]}) × processes ({world_size()}) is not "
            f"completions_per_step ({run.completions_per_step}): leave one of them out"
        )
    value = trl.get(given, run.completions_per_step // world_size())
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{given} must be a whole number above 0, got {value!r}")
    if run.completions_per_step % (value * world_size()):
        raise ConfigError(
            f"completions_per_step ({run.completions_per_step}) must be a multiple of {given} × processes "
            f"({value} × {world_size()})"
        )
    return {given: value, other: run.completions_per_step // (value * world_size())}


def _check_training(run: RunConfig, args: dict[str, Any]) -> None:
    """Refuse what TRL would accept and then fail at, or do otherwise than a user expects."""
    positive = ("num_generations", "max_steps", "save_steps", "num_iterations", "max_completion_length")
    _at_least(1, {name: args.get(name) for name in positive})
    _at_least(0, {"seed": args.get("seed"), "top_k": args.get("top_k")})
    ranges = {"learning_rate": (0, 1e3), "temperature": (0, 100), "top_p": (0, 1), "adam_beta1": (0, 0.9999999),
              "adam_beta2": (0, 0.9999999), "adam_epsilon": (0, 1), "top_entropy_quantile": (0, 1)}  # fmt: skip
    for name, (low, high) in ranges.items():
        if name in args and not low < args[name] <= high:
            raise ConfigError(f"{name} must be greater than {low} and at most {high:g}, got {args[name]}")
    for name, known in TRL_CHOICES.items():
        if args.get(name, known[0]) not in known:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, known))}, got {args[name]!r}")
    for name, wanted in {"logging_steps": 1, "logging_strategy": "steps", "save_only_model": False,
                         "ignore_data_skip": False, "resume_from_checkpoint": None}.items():  # fmt: skip
        if args.get(name, wanted) != wanted:
            raise ConfigError(f"{name} must stay {wanted}: a run logs every step and resumes exactly, by itself")
    if args.get("save_total_limit") is not None:
        _at_least(2, {"save_total_limit": args["save_total_limit"]})  # one alone, once damaged, leaves none
    _check_optimizer(run.capo, args.get("optim", "adamw_torch"))
    accumulation = args["gradient_accumulation_steps"]
    reuse = (args.get("steps_per_generation") or accumulation) * args.get("num_iterations", 1)
    if args.get("save_steps", 500) * accumulation % reuse:
        raise ConfigError(
            f"save_steps ({args['save_steps']}) must not fall between two steps on the same completions: make it a "
            f"multiple of {reuse // math.gcd(reuse, accumulation)}"
        )
    if math.isfinite(run.capo.skip_gradient_norm) and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(
            "capo.skip_gradient_norm cannot stop DeepSpeed's step, which it takes within its backward pass: launch "
            "with --accelerator fsdp or ddp"
        )
    if run.capo.weighs and (args.get("entropy_coef") or args.get("use_adaptive_entropy")):
        raise ConfigError("an entropy bonus would act on rejected tokens: set entropy_coef=0, or capo.mode=observe")


def _check_optimizer(capo: CAPOConfig, optim: str) -> None:
    """Refuse a model of another optimizer than the real one, but the paper's SGD model of Adam's steps (Fig. 6)."""
    real = next((kind for kind in ("adam", "sgd") if kind in optim), None)
    if not capo.on or real == capo.optimizer_model:
        return
    if real is None or real == "sgd":
        raise ConfigError(
            f"capo.optimizer_model={capo.optimizer_model} does not describe the steps of optim={optim}: use an Adam, "
            "or optim=sgd with capo.optimizer_model=sgd, or capo.mode=off"
        )
    if capo.step.acts and capo.step.predicts:
        raise ConfigError(
            f"capo.step_policy_shift plans the step that optim={optim} takes: it needs capo.optimizer_model={real}"
        )


def _check_batch(run: RunConfig, trl: dict[str, Any]) -> None:
    generations = trl.get("num_generations", 8)
    if run.completions_per_step % generations:
        raise ConfigError(
            f"completions_per_step ({run.completions_per_step}) must be a multiple of num_generations ({generations})"
        )
    whole = trl["gradient_accumulation_steps"] == 1 and world_size() == 1
    if run.capo.on and run.capo.granularity in ("group", "batch") and not whole:
        raise ConfigError(
            f"capo.granularity={run.capo.granularity} judges completions together that one forward pass must hold: "
            f"run one process with per_device_train_batch_size={run.completions_per_step}"
        )
    loss = trl.get("loss_type", "dapo")
    if run.capo.weighs and run.capo.denominator == "kept" and loss not in KEPT_LOSSES:
        raise ConfigError(
            f"capo.denominator=kept is defined for the losses {', '.join(KEPT_LOSSES)}, not for {loss}: "
            "use capo.denominator=all"
        )
