"""Typed settings of a run: a composed recipe becomes `RunConfig` (ours) and values for TRL's `GRPOConfig`.

A recipe's keys are flat and named as TRL's fields; its groups (`capo`, `data`, `lab`, …) are ours.
Whatever is of the wrong type or out of range ends in one `ConfigError`, before anything is built or written.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from open_r1_capo.settings.batch import ACCUMULATION, MICRO, split_batch
from open_r1_capo.settings.budget import BudgetConfig
from open_r1_capo.settings.capo import CAPOConfig, capo_config, capo_keys
from open_r1_capo.settings.trl_fields import TRL_FIELDS
from open_r1_capo.settings.values import ConfigError, Kinds, at_least, convert, make, schema
from open_r1_capo.tasks.data import check_user_prompt
from open_r1_capo.tasks.lab.settings import LabSettings
from open_r1_capo.tasks.smollm2.settings import SmolLM2Settings
from open_r1_capo.tasks.source import POLICIES, policy_source, problem_source

GROUPS = ("method", "rule", "budget", "regime", "scale", "task", "generation", "fidelity")  # folders of recipes/
# what `fit_machine` chooses where the recipe does not; `use_vllm` only where that is null
FITTED = ("use_cpu", "bf16", "gradient_checkpointing", MICRO, "use_vllm")


@dataclass
class DataConfig:
    """Where the problems come from; see `ProblemSource.reads` for what a source reads."""

    # `lab`, `reasoning_gym/<task>`, a named data set of `open_r1_capo.tasks.data`, or any hub data set
    name: str | None = None
    path: str | None = None  # a local JSONL or Parquet file or folder, instead of the hub
    config: str | None = None  # of the hub data set
    split: str = "train"  # of the hub data set
    problem_column: str | None = None  # null finds it
    answer_column: str | None = None  # null finds it
    max_prompt_tokens: int | None = 512  # of a prompt with its template (Table 2: 512); null is any number
    long_prompts: str = "leave_out"  # what becomes of longer ones: leave_out, or cut_left (to their last tokens)
    problems: int = 2000  # how many to draw, from a source that draws them
    variant: str = "base"  # their kind, such as one of the lab's eight, in training and in `evaluation.problems`
    options: dict[str, Any] = field(default_factory=dict)  # the settings of a reasoning-gym task, such as max_terms

    def __post_init__(self):
        """Check choices and ranges; raises ValueError."""
        if self.long_prompts not in ("leave_out", "cut_left"):
            raise ValueError(f"long_prompts must be leave_out or cut_left, got {self.long_prompts!r}")
        at_least(1, problems=self.problems, max_prompt_tokens=self.max_prompt_tokens)
        if not isinstance(self.options, dict):
            raise ValueError(f"options is a group of settings: write data.options.<name>=, got {self.options!r}")
        problem_source(self.name, self.path).check(self)


@dataclass
class EvaluationConfig:
    """Accuracy on held-out problems of `data.name`: before training, at every checkpoint, and at the end."""

    problems: int = 0  # how many held-out problems; 0 is off (`make eval` measures policies too)
    samples: int = 1  # completions a problem
    suite: int = 0  # held-out problems of each test set, whose mean accuracy is TEST, in eval.jsonl; 0 is off
    every: int = 10  # optimizer steps between two measurements of TEST (App. G: 10)
    # --- of `make eval` ---
    prompt: str | None = None  # the user's turn, with {problem} in it and no system turn; null is that of training
    max_length: int | None = None  # tokens of a prompt and its answer together; null bounds the answer alone

    def __post_init__(self):
        """Check ranges; raises ValueError."""
        at_least(0, problems=self.problems, suite=self.suite)
        at_least(1, samples=self.samples, every=self.every, max_length=self.max_length)
        if self.prompt is not None:
            check_user_prompt(self.prompt, "prompt")


@dataclass
class RunConfig:
    """Everything that is not TRL's: which run this is and what surrounds the trainer."""

    recipe: str
    scale: str
    model_name_or_path: str  # a local folder or hub id; `lab` and `smollm2` are made or fetched first
    completions_per_step: int  # over all ranks; sets TRL's gradient accumulation
    advantage_baseline: str = "group"  # `group` subtracts the group's mean reward; `none` is REINFORCE on the reward
    optimizer: str | None = None  # a name of the package pytorch-optimizer, such as prodigy, in place of `optim`
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy"])  # names in `tasks.rewards`
    system_prompt: str | None = None  # null is the default of `tasks.data`; an empty string sends none
    share_prompts: bool = False  # compute a prompt once for all its completions: for completions that are short
    num_threads: int | None = None  # CPU threads of torch; null leaves torch's choice
    needs_gpu: bool = False  # refuse to start without a CUDA device
    fit_machine: bool = False  # device, precision and micro-batch that are not set follow from the machine
    output_root: str = "outputs"  # the run's folder is <output_root>/<recipe>[,<variant>]/<scale>/seed<seed>
    variant: str = ""  # a name for what was changed in the recipe, such as `learning_rate=0.0004`
    overwrite: bool = False  # throw an older run of the same folder away
    allow_other_processes: bool = False  # go on with another number of processes, though not exactly
    token_records: str = "notable"  # keep what became of each token in `notable` steps, `all`, or `none`
    # --- LoRA, by the names of TRL's ModelConfig ---
    use_peft: bool = False  # train adapters, not the weights
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0  # TRL's is 0.05, under which no KL of a step can be measured
    lora_target_modules: list[str] | None = None  # null is peft's choice; all-linear, or names such as q_proj
    lora_modules_to_save: list[str] | None = None  # trained whole, such as lm_head
    use_rslora: bool = False
    use_dora: bool = False
    capo: CAPOConfig = field(default_factory=CAPOConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    lab: LabSettings = field(default_factory=LabSettings)  # the policy of model_name_or_path=lab
    smollm2: SmolLM2Settings = field(default_factory=SmolLM2Settings)  # the copy of model_name_or_path=smollm2

    def __post_init__(self):
        """Check choices and ranges; raises ValueError."""
        if self.advantage_baseline not in ("group", "none"):
            raise ValueError(f"advantage_baseline must be 'group' or 'none', got {self.advantage_baseline!r}")
        if self.token_records not in ("notable", "all", "none"):
            raise ValueError(f"token_records must be one of notable, all, none, got {self.token_records!r}")
        at_least(1, completions_per_step=self.completions_per_step, num_threads=self.num_threads, lora_r=self.lora_r)
        at_least(1, lora_alpha=self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is a share from 0 to below 1, got {self.lora_dropout}")
        source = problem_source(self.data.name)  # of the evaluation, also where data.path is trained on
        for name in ("problems", "suite"):
            if getattr(self.evaluation, name) and name not in source.measures:
                what = "held-out problems" if name == "problems" else "named test sets"
                raise ValueError(
                    f"evaluation.{name} needs {what}, which data.name={self.data.name} does not have: set it to 0 and "
                    "use make eval"
                )
        if self.evaluation.problems and self.data.path:
            try:
                source.check(self.data)
            except ValueError as error:
                raise ValueError(f"data.{error}") from None
        if "score" in self.reward_funcs and not problem_source(self.data.name, self.data.path).scores:
            raise ValueError("reward_funcs=[score] needs problems of data.name=reasoning_gym/<task>: use accuracy")
        if "/" in self.variant:
            raise ValueError(f"variant is a part of a folder's name and has no '/', got {self.variant!r}")
        if self.budget.on and self.capo.step.acts:
            raise ValueError("budget.rule measures each step, capo.step_policy_shift predicts it: leave one out")
        if not self.reward_funcs:
            raise ValueError("reward_funcs is empty: name at least one reward, for example reward_funcs=[accuracy]")

    def folder(self, seed: int) -> Path:
        """The run's own folder."""
        name = f"{self.recipe},{self.variant}" if self.variant else self.recipe
        return Path(self.output_root) / name / self.scale / f"seed{seed}"

    @property
    def policy_settings(self) -> Any:
        """The settings of `policy_source(model_name_or_path)`, such as `lab`; None without a group."""
        group = policy_source(self.model_name_or_path).group
        return getattr(self, group) if group else None


def _settings() -> dict[str, Kinds]:
    """Full name of every setting, and what values it takes."""
    ours = {name: kinds for name, kinds in schema(RunConfig).items() if not name.startswith("capo.")}
    capo = {f"capo.{name}": kinds for name, kinds in capo_keys().items()}
    trl = {name: one.kinds for name, one in TRL_FIELDS.items()} | {"use_vllm": ("bool", "null")}
    return trl | dict.fromkeys(GROUPS, ("str",)) | ours | capo


SETTINGS = _settings()
KEPT_LOSSES = ("grpo", "dr_grpo", "bnpo")  # whose token count is known within the micro-batch
TRL_CHOICES = {  # which TRL checks when the first batch has been generated
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"),
}
TRL_RANGES = {  # greater than the first, at most the second
    "learning_rate": (0, 1e3),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "adam_beta1": (0, 0.9999999),
    "adam_beta2": (0, 0.9999999),
    "adam_epsilon": (0, 1),
    "top_entropy_quantile": (0, 1),
}
TRL_FIXED = {  # a run logs every step and resumes exactly, by itself
    "logging_steps": 1,
    "logging_strategy": "steps",
    "save_only_model": False,
    "ignore_data_skip": False,
    "resume_from_checkpoint": None,
}


def read(settings: dict[str, Any], processes: int = 1) -> tuple[RunConfig, dict[str, Any]]:
    """Type and check a composed recipe, for a launch of so many processes; asks neither machine nor environment.

    Returns:
        Our settings, and a value for every field of TRL's `GRPOConfig`, its default where the recipe has none.

    Raises:
        ConfigError: a value of the wrong type or out of range, or one that nothing reads.
    """
    for key in ("model_name_or_path", "completions_per_step"):
        if settings.get(key) is None:
            example = "<folder or hub id>" if key == "model_name_or_path" else "<number>"
            raise ConfigError(f'{key} is not set: add {key}={example} (make: ARGS="{key}=…")')
    values = convert(settings, SETTINGS)
    _check_policy(values)
    capo = capo_config(**values.pop("capo", {}))
    ours = {name: value for name, value in values.items() if name in RunConfig.__dataclass_fields__}
    run = make(RunConfig, ours | {"capo": capo})
    if values.get("fidelity") == "paper":
        _check_texts(run)
    trl = {name: values.get(name, one.default) for name, one in TRL_FIELDS.items()}
    batch = split_batch(run.completions_per_step, processes, values.get(MICRO), values.get(ACCUMULATION))
    trl |= dict(zip((MICRO, ACCUMULATION), batch, strict=True))
    trl["output_dir"] = str(run.folder(trl["seed"]) / "checkpoints")
    _check_trl(trl)
    _check_optimizer(run, trl["optim"])
    _check_batch(run, trl, processes)
    return run, trl


def policy_settings(name: str, settings: dict[str, Any]) -> Any:
    """The typed settings that `policy_source(name)` wants, if any; raises ConfigError for wrong values."""
    group = policy_source(name).group
    if group is None:
        return None
    values = convert({group: settings.get(group)}, SETTINGS)[group]
    return make(get_type_hints(RunConfig)[group], values, f"{group}.")


def pin_policy(settings: dict[str, Any]) -> dict[str, Any]:
    """A composed recipe, completed by which policy it leads to on this machine; see `PolicySource.pinned`."""
    name = settings["model_name_or_path"]
    source, given = policy_source(name), policy_settings(name, settings)
    pinned = source.pinned(given)
    return settings if pinned == given else settings | {source.group: asdict(pinned)}


def _check_policy(values: dict[str, Any]) -> None:
    """Refuse settings of a policy that is not the run's."""
    model = values["model_name_or_path"]
    for name, source in POLICIES.items():
        if source is not policy_source(model) and values.get(source.group or ""):
            key = f"{source.group}.{next(iter(values[source.group]))}"
            raise ConfigError(f"{key} has no effect with model_name_or_path={model}: set that to {name}")


def _check_texts(run: RunConfig) -> None:
    """Refuse `fidelity=paper` with prompts of ours."""
    measures = problem_source(run.data.name, run.data.path).measures
    missing = ["system_prompt"] if run.system_prompt is None else []
    missing += ["evaluation.prompt"] if run.evaluation.prompt is None and not measures else []
    if missing:
        raise ConfigError(
            f"fidelity=paper wants the authors' prompts, which are not ours to copy: set "
            f"{' and '.join(f'{name}=@<file>' for name in missing)} (docs/deviations.md says where they are published)"
        )


def _check_trl(trl: dict[str, Any]) -> None:
    """Refuse what TRL would accept and later fail at, or what would do something a user does not expect."""
    positive = ("num_generations", "max_steps", "save_steps", "num_iterations", "max_completion_length")
    at_least(1, **{name: trl[name] for name in positive})
    at_least(0, seed=trl["seed"], top_k=trl["top_k"])
    at_least(2, save_total_limit=trl["save_total_limit"])  # one alone, once damaged, leaves none
    for name, (low, high) in TRL_RANGES.items():
        if not low < trl[name] <= high:
            raise ConfigError(f"{name} must be greater than {low} and at most {high:g}, got {trl[name]}")
    for name, known in TRL_CHOICES.items():
        if trl[name] not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, got {trl[name]!r}")
    for name, wanted in TRL_FIXED.items():
        if trl[name] != wanted:
            raise ConfigError(f"{name} must stay {wanted}: a run logs every step and resumes exactly, by itself")
    reuse = (trl["steps_per_generation"] or trl[ACCUMULATION]) * trl["num_iterations"]
    if trl["save_steps"] * trl[ACCUMULATION] % reuse:
        raise ConfigError(
            f"save_steps ({trl['save_steps']}) must not fall between two steps on the same completions: make it a "
            f"multiple of {reuse // math.gcd(reuse, trl[ACCUMULATION])}"
        )


def _check_optimizer(run: RunConfig, optim: str) -> None:
    """Refuse a model of another optimizer than the real one, but the paper's SGD model of Adam's steps (Fig. 6)."""
    capo = run.capo
    if run.optimizer and capo.on:
        raise ConfigError(f"optimizer={run.optimizer} takes steps that CAPO does not model: use capo.mode=off")
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


def _check_batch(run: RunConfig, trl: dict[str, Any], processes: int) -> None:
    """Refuse a batch or a loss that CAPO's settings are not defined for."""
    completions, generations, capo = run.completions_per_step, trl["num_generations"], run.capo
    if completions % generations:
        raise ConfigError(
            f"completions_per_step ({completions}) must be a multiple of num_generations ({generations})"
        )
    whole = trl[ACCUMULATION] == 1 and processes == 1
    if capo.on and capo.granularity in ("group", "batch") and not whole:
        raise ConfigError(
            f"capo.granularity={capo.granularity} judges completions together that one forward pass must hold: "
            f"run one process with {MICRO}={completions}"
        )
    if capo.on and capo.hidden_states == "one_late" and run.share_prompts:
        raise ConfigError(
            "capo.hidden_states=one_late reads the state at a completion's last token, which share_prompts=true "
            "leaves out: set share_prompts=false"
        )
    if not capo.weighs:
        return
    if trl["entropy_coef"] or trl["use_adaptive_entropy"]:
        raise ConfigError("an entropy bonus would act on rejected tokens: set entropy_coef=0, or capo.mode=observe")
    if capo.denominator == "kept" and trl["loss_type"] not in KEPT_LOSSES:
        raise ConfigError(
            f"capo.denominator=kept is defined for the losses {', '.join(KEPT_LOSSES)}, not for {trl['loss_type']}: "
            "use capo.denominator=all"
        )
