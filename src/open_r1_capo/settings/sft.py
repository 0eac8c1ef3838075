"""Typed settings of a cold start: a recipe of `recipes/sft` becomes `SFTRun` (ours) and values for `SFTConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from open_r1_capo.settings.recipes import RECIPES, composed
from open_r1_capo.settings.run import DataConfig
from open_r1_capo.settings.trl_fields import TRLField, installed
from open_r1_capo.settings.values import ConfigError, Kinds, at_least, convert, make, schema

OURS = ("output_dir", "save_strategy", "eval_strategy")  # of TRL's: the result is saved and measured here
POSITIVE = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")


@dataclass
class HeldOutConfig:
    """Accuracy on held-out problems, before and after."""

    problems: int = 100  # 0 measures nothing
    samples: int = 1  # completions a problem

    def __post_init__(self):
        """Check ranges; raises ValueError."""
        at_least(0, problems=self.problems)
        at_least(1, samples=self.samples)


@dataclass
class SFTRun:
    """Everything that is not TRL's."""

    recipe: str
    model_name_or_path: str  # a local folder or hub id; `lab` is the lab's policy with its default settings
    task: str = ""  # which of recipes/task was chosen
    system_prompt: str | None = None  # null is the default of `tasks.data`; an empty string sends none
    num_threads: int | None = None  # CPU threads of torch; null leaves torch's choice
    output_root: str = "outputs/sft"  # the result's folder is <output_root>/<recipe>-<key>
    overwrite: bool = False  # make the result again
    temperature: float = 0.9  # of the held-out completions
    max_completion_length: int = 256  # tokens of a held-out completion
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)

    def __post_init__(self):
        """Check ranges; raises ValueError."""
        at_least(1, num_threads=self.num_threads, max_completion_length=self.max_completion_length)
        if not 0 < self.temperature <= 100:
            raise ValueError(f"temperature must be greater than 0 and at most 100, got {self.temperature}")


@cache
def _fields() -> dict[str, TRLField]:
    return {name: one for name, one in installed("SFTConfig").items() if name not in OURS}


def _known() -> dict[str, Kinds]:
    """Full name of every setting, and what values it takes; imports TRL."""
    return {name: one.kinds for name, one in _fields().items()} | schema(SFTRun)


def known_sft() -> list[str]:
    """The names of `recipes/sft/*.yaml`."""
    return sorted(path.stem for path in (RECIPES / "sft").glob("*.yaml"))


def compose_sft(name: str, overrides: list[str]) -> dict[str, Any]:
    """Compose a recipe of `recipes/sft` with overrides into plain settings; raises ConfigError as `compose_recipe`."""
    if name not in known_sft():
        raise ConfigError(f"there is no cold start {name!r}; there are {', '.join(known_sft())}")
    return composed(f"sft/{name}", overrides, _known()) | {"recipe": name}


def read_sft(settings: dict[str, Any]) -> tuple[SFTRun, dict[str, Any]]:
    """Type and check a composed cold start.

    Returns:
        Our settings, and those values for TRL's `SFTConfig` that the recipe has.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """
    if settings.get("model_name_or_path") is None:
        raise ConfigError("model_name_or_path is not set: name the policy to start from, a folder or hub id")
    values = convert(settings, _known())
    at_least(1, **{name: values.get(name) for name in POSITIVE})
    if not values["learning_rate"] > 0:
        raise ConfigError(f"learning_rate must be greater than 0, got {values['learning_rate']}")
    run = make(SFTRun, {name: value for name, value in values.items() if name in SFTRun.__dataclass_fields__})
    return run, {name: value for name, value in values.items() if name in _fields()}
