"""Hydra composes a recipe; every key is checked before anything is built or written."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from open_r1_capo.settings.capo import ConfigError, capo_keys, unread
from open_r1_capo.settings.run import NESTED, OURS, TRL_FIELDS

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
GROUPS = ("method", "budget", "regime", "scale", "generation")
LAB_IGNORES = ("data.config", "data.split", "data.problem_column", "data.answer_column")


def known_recipes() -> list[str]:
    """The names of `recipes/*.yaml`, without the base."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "base")


def compose_recipe(name: str, overrides: list[str]) -> dict[str, Any]:
    """Compose a recipe with command-line overrides into plain settings.

    Args:
        name: a recipe of `known_recipes`.
        overrides: `key=value`, also of TRL fields that the recipe does not mention, and `group=option`.

    Returns:
        The resolved settings.

    Raises:
        ConfigError: an unknown recipe, group option or key (with the nearest valid one).
    """
    if name not in known_recipes():
        raise ConfigError(f"there is no recipe {name!r}; the recipes are {', '.join(known_recipes())}")
    checked = [_checked_override(item) for item in overrides]
    try:
        with initialize_config_dir(config_dir=str(RECIPES), version_base="1.3"):
            settings = OmegaConf.to_container(compose(name, [*checked, f"++recipe={name}"]), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the recipe {name} cannot be composed: {' '.join(str(error).split())}") from None
    for key in ("regimes", "thresholds"):  # the scale's tables, read by the groups through interpolation
        settings.pop(key, None)
    _check_keys(settings)
    _check_used(settings, overrides)
    return settings


def _checked_override(item: str) -> str:
    key, separator, value = item.partition("=")
    if not separator:
        raise ConfigError(f"an override is written key=value, got {item!r}")
    key = key.lstrip("+")
    if key in GROUPS:
        known = sorted(path.stem for path in (RECIPES / key).glob("*.yaml"))
        if value not in known:
            raise ConfigError(f"there is no {key} {value!r}; there are {', '.join(known)}")
        return item.lstrip("+")
    if key == "recipe":
        raise ConfigError("recipe follows from the recipe's name: choose it with --config-name (make: RECIPE=)")
    _check_keys(_nest(key))
    return "++" + item.lstrip("+")


def _nest(key: str) -> dict[str, Any]:
    head, _, tail = key.partition(".")
    return {head: {tail: None}} if tail else {head: None}


def _fields(kind: type, group: str) -> Iterator[str]:
    """Full names of a group's settings, and of the settings of the groups in it."""
    for name, hint in get_type_hints(kind).items():
        if name in {f.name for f in dataclasses.fields(kind)}:
            yield f"{group}.{name}"
            yield from _fields(hint, f"{group}.{name}") if dataclasses.is_dataclass(hint) else ()


def _keys(settings: dict[str, Any], valid: set[str], group: str = "") -> Iterator[str]:
    """Full names of what is set: of each known group its settings, of anything else the name alone."""
    for key, value in settings.items():
        name = group + key
        if isinstance(value, dict) and name in valid:
            yield from _keys(value, valid, f"{name}.")
        else:
            yield name


def _check_keys(settings: dict[str, Any]) -> None:
    valid = OURS | set(TRL_FIELDS) | set(NESTED) | set(GROUPS) | {"capo", *(f"capo.{key}" for key in capo_keys())}
    valid |= {name for key, kind in NESTED.items() for name in _fields(kind, key)}
    for name in _keys(settings, valid):
        if name not in valid:
            near = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "; it is neither a field of TRL's GRPOConfig nor ours"
            raise ConfigError(f"there is no setting {name!r}{hint}")
        if name == "output_dir":
            raise ConfigError("output_dir follows from the recipe's name and seed: set output_root instead")


def _check_used(settings: dict[str, Any], overrides: list[str]) -> None:
    """Refuse an override that nothing reads under the other settings."""
    groups = ("capo", "data", "evaluation")
    capo, data, evaluation = ({} if not isinstance(settings.get(k), dict) else settings[k] for k in groups)
    for item in overrides:
        key = item.partition("=")[0].lstrip("+")
        reason = None
        if key.startswith("capo."):
            reason = unread(key.removeprefix("capo."), capo)
        elif key == "token_records" and capo.get("mode") == "off":
            reason = "capo.mode=off"
        elif key == "evaluation.every" and not evaluation.get("suite"):
            reason = "evaluation.suite=0"
        elif key == "evaluation.samples" and not (evaluation.get("suite") or evaluation.get("problems")):
            reason = "evaluation.problems=0"
        elif key.startswith("vllm_") and not settings.get("use_vllm"):
            reason = "use_vllm=false"
        elif key in ("data.problems", "data.variant") and (data.get("name") != "lab" or data.get("path")):
            reason = "a data set other than the lab's"
        elif key in LAB_IGNORES and data.get("name") == "lab" and not data.get("path"):
            reason = "data.name=lab"
        if key == "capo.denominator" and settings.get("loss_type") == "dr_grpo":
            reason = reason or "loss_type=dr_grpo"
        if reason:
            raise ConfigError(f"{key} has no effect with {reason}; change that, or leave {key} out")
