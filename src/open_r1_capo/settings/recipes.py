"""Hydra composes a recipe; every key is checked before anything is built or written."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from open_r1_capo.settings.capo import unread
from open_r1_capo.settings.run import GROUPS, SETTINGS
from open_r1_capo.settings.values import GROUP, ConfigError, Kinds
from open_r1_capo.tasks.data import read_prompt
from open_r1_capo.tasks.source import problem_source

INSTALLED = Path(__file__).resolve().parents[1] / "recipes"  # by pip, without the repository
RECIPES = INSTALLED if INSTALLED.is_dir() else INSTALLED.parents[2] / "recipes"
TABLES = ("regimes", "thresholds")  # of a scale or a rule, read by the groups through interpolation
RATES = ("learning_rate", "lr_scheduler_type", "warmup_steps")  # a budget that is the target replaces them
SHORT = {"reward": "reward_funcs"}
PATHS = ("data.path", "model_name_or_path", "output_root", "reward_funcs")  # whose values are no grammar of Hydra's
PLAIN = re.compile(r"[\w./:%@+-]*|\[.*\]", re.ASCII)  # what Hydra reads as it stands; a list
ALIASES = dict.fromkeys(("lora", "peft", "peft_config", "use_lora"), "use_peft")  # what others call it
ANY_SOURCE = ("name", "path", "max_prompt_tokens", "long_prompts")  # settings of `data` that every source reads


def known_recipes() -> list[str]:
    """The names of `recipes/*.yaml`, without the base."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "base")


def compose_recipe(name: str, overrides: list[str]) -> dict[str, Any]:
    """Compose a recipe with overrides (`key=value` also of any TRL field, `group=option`) into plain settings.

    Raises:
        ConfigError: an unknown recipe, group option or key (with the nearest valid one), or an override that nothing
            reads under the other settings.
    """
    if name not in known_recipes():
        near = difflib.get_close_matches(name, known_recipes(), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; the recipes are {', '.join(known_recipes())}"
        raise ConfigError(f"there is no recipe {name!r}{hint}")
    overrides = [_spelt_out(item) for item in overrides]
    settings = composed(name, overrides, SETTINGS) | {"recipe": name}
    _own_file(settings, {_key(item) for item in overrides})
    for item in overrides:
        key = _key(item)
        if reason := _unread(key, settings):
            raise ConfigError(f"{key} has no effect with {reason}; change that, or leave {key} out")
    return settings


def composed(file: str, overrides: list[str], known: Mapping[str, Kinds]) -> dict[str, Any]:
    """Compose a file of `recipes/`, whose settings must all be `known`, as must the overrides'; raises ConfigError."""
    checked = [_checked_override(item, known) for item in overrides]
    try:
        with initialize_config_dir(config_dir=str(RECIPES), version_base="1.3"):
            settings = OmegaConf.to_container(compose(file, checked), resolve=True)
    except OverrideParseException as error:
        key, _, value = error.override.lstrip("+").partition("=")
        raise ConfigError(
            f"{key}={value} cannot be read (Hydra's grammar has a meaning for some of its signs); put the value into "
            f"quotes: {key}={_quoted(value)}"
        ) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the recipe {file} cannot be composed: {' '.join(str(error).split())}") from None
    settings = {key: value for key, value in settings.items() if key not in (*TABLES, "hydra")}
    _check_keys(settings, known)
    _read_prompts(settings)
    return settings


def _spelt_out(override: str) -> str:
    """The override under its full name; of a path, with ~ expanded and in quotes where Hydra wants them."""
    key, equals, value = override.partition("=")
    key = SHORT.get(key, key)
    if _key(key) in PATHS:
        inner = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
        inner = os.path.expanduser(inner)
        value = inner if PLAIN.fullmatch(inner) and inner == value.strip("'\"") else _quoted(inner)
    return key + equals + value


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _own_file(settings: dict[str, Any], given: set[str]) -> None:
    """Let `data.path` without `data.name` mean that file: not the scale's set, and none of its held-out problems."""
    data = settings.get("data")
    if "data.path" not in given or "data.name" in given or not isinstance(data, dict) or not data.get("path"):
        return
    data["name"] = None
    evaluation = settings.get("evaluation")
    for name in ("problems", "suite"):
        if isinstance(evaluation, dict) and f"evaluation.{name}" not in given:
            evaluation.pop(name, None)


def _read_prompts(settings: dict[str, Any]) -> None:
    """Put the text of a file in the place of @<file>; DataError if it cannot be read."""
    for group, name in ((settings, "system_prompt"), (settings.get("evaluation"), "prompt")):
        value = group.get(name) if isinstance(group, dict) else None
        if isinstance(value, str) and value.startswith("@"):
            group[name] = read_prompt(value[1:])


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _checked_override(item: str, settings: Mapping[str, Kinds]) -> str:
    key, value = _key(item), item.partition("=")[2]
    if "=" not in item:
        raise ConfigError(f"an override is written key=value, got {item!r}")
    if key in GROUPS:
        known = sorted(path.stem for path in (RECIPES / key).glob("*.yaml"))
        if value not in known:
            raise ConfigError(f"there is no {key} {value!r}; there are {', '.join(known)}")
        return item.lstrip("+")
    if key == "recipe":
        raise ConfigError("recipe follows from the recipe's name: choose it with --config-name (make: RECIPE=)")
    nested: Any = None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    _check_keys(nested, settings)
    return "++" + item.lstrip("+")


def _names(settings: dict[str, Any], known: Mapping[str, Kinds], prefix: str = "") -> Iterator[str]:
    """Full names of all settings, such as `capo.mode`."""
    for key, value in settings.items():
        name = prefix + key
        if isinstance(value, dict) and known.get(name) == GROUP:
            yield from _names(value, known, f"{name}.")
        else:
            yield name


def _check_keys(settings: dict[str, Any], known: Mapping[str, Kinds]) -> None:
    for name in _names(settings, known):
        if name == "output_dir":
            raise ConfigError("output_dir follows from the recipe's name and seed: set output_root instead")
        if name not in known:
            near = [ALIASES[name]] if name in ALIASES else difflib.get_close_matches(name, sorted(known), 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else "; it is neither a field of TRL's configuration nor ours"
            raise ConfigError(f"there is no setting {name!r}{hint}")


def _unread(key: str, settings: dict[str, Any]) -> str | None:
    """The setting that makes `key` unused, such as `use_vllm=false`; None if it is used."""
    groups = ("capo", "budget", "data", "evaluation")
    capo, budget, data, evaluation = ({} if not isinstance(settings.get(k), dict) else settings[k] for k in groups)
    group, _, name = key.rpartition(".")
    reason = None
    if group == "capo":
        reason = unread(name, capo)
        if name == "denominator" and settings.get("loss_type") == "dr_grpo":
            reason = reason or "loss_type=dr_grpo"
        if name == "measure_kl" and budget.get("rule", "none") != "none":
            reason = f"budget.rule={budget['rule']} (budget.share says what is measured)"
    elif key.startswith("data.") and (name := key.split(".")[1]) not in ANY_SOURCE:
        source = problem_source(str(data.get("name")), data.get("path"))
        if name not in source.reads:
            reason = f"data.path={data['path']}" if data.get("path") else f"data.name={data.get('name')}"
    elif group == "budget" and name != "rule" and budget.get("rule", "none") == "none":
        reason = "budget.rule=none"
    elif key in RATES and budget.get("rule") == "target":
        reason = "budget.rule=target"
    elif key == "token_records" and capo.get("mode") == "off":
        reason = "capo.mode=off"
    elif key == "evaluation.every" and not evaluation.get("suite"):
        reason = "evaluation.suite=0"
    elif key == "evaluation.samples" and not (evaluation.get("suite") or evaluation.get("problems")):
        reason = "evaluation.problems=0"
    elif key.startswith(("lora_", "use_rslora", "use_dora")) and not settings.get("use_peft"):
        reason = "use_peft=false"
    elif key.startswith("vllm_") and settings.get("use_vllm", False) is False:
        reason = "use_vllm=false"
    return reason
