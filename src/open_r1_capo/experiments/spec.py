"""Experiments: the runs that a figure or a table of the paper needs, and where they are.

A file `recipes/experiments/<name>.yaml` has these keys:

    title     one line
    arms      a list of {label, recipe, overrides: {key: value}, grid: {key: [values]}}; a grid makes several arms
    seeds     of every arm
    scales    overrides of all runs at some scales: {<pattern of scale names>: {key: value}}, such as `lab*`
    search    the grid's key whose largest surviving value is searched by bisection; without it everything is run
    extends   another experiment, whose keys hold where this file has none
    only      labels of the arms that are taken

`common.yaml` has the `scales` of every experiment. Runs are in
`outputs/experiments/<recipe>[,<key>=<value>…]/<scale>/seed<seed>`: the folder says what the run is, so experiments
that share an arm share its runs.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from open_r1_capo.runs.exit import UserError
from open_r1_capo.settings.recipes import RECIPES

EXPERIMENTS = RECIPES / "experiments"
SCALES = EXPERIMENTS.parent / "scale"
COMMON = "common"
OUTPUTS = Path("outputs/experiments")
KEYS = {"title", "arms", "seeds", "scales", "search", "extends", "only"}
ARM_KEYS = {"label", "recipe", "overrides", "grid"}


class ExperimentError(UserError, ValueError):
    """An experiment cannot be read or run."""


@dataclass(frozen=True)
class Arm:
    """One line of a figure: a recipe and its overrides, each `key=value`."""

    label: str  # in the legend; the arms of a grid share it
    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Recipe and overrides, as the folder of its runs is named."""
        return ",".join((self.recipe, *self.overrides))

    def value(self, key: str) -> float | None:
        """The number that the override of `key` sets, if there is one."""
        value = dict(item.split("=", 1) for item in self.overrides).get(key)
        return None if value in (None, "null") else float(value)


@dataclass(frozen=True)
class Experiment:
    """The runs of one figure at one scale; see the module for the keys of its file."""

    name: str
    title: str
    scale: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    common: tuple[str, ...] = ()  # overrides that all runs of the scale share
    search: str | None = None
    root: Path = OUTPUTS  # holds the runs' folders

    def folder(self, arm: Arm, seed: int) -> Path:
        """The folder of one run."""
        return self.root / arm.name / self.scale / f"seed{seed}"

    def overrides(self, arm: Arm, seed: int) -> list[str]:
        """What a run is started with, beside its recipe."""
        variant = [f"variant='{','.join(arm.overrides)}'"] if arm.overrides else []
        place = [f"scale={self.scale}", f"seed={seed}", f"output_root={self.root}"]
        return [*place, *variant, *self.common, *arm.overrides]

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Every arm with every seed, seed by seed, so that an interrupted sweep has whole seeds."""
        return ((arm, seed) for seed, arm in itertools.product(self.seeds, self.arms))


def known_experiments() -> list[str]:
    """The names of `recipes/experiments/*.yaml`."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.stem != COMMON)


def known_scales() -> list[str]:
    """The names of `recipes/scale/*.yaml`."""
    return sorted(path.stem for path in SCALES.glob("*.yaml"))


def load(name: str, scale: str = "lab", seeds: int | None = None) -> Experiment:
    """Read an experiment and write its grids out; `seeds` takes only the first so many of its seeds.

    Raises:
        ExperimentError: an unknown experiment, scale or key, an arm without label or recipe, or fewer seeds than
            asked for.
    """
    if name not in known_experiments():
        near = difflib.get_close_matches(name, known_experiments(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ExperimentError(f"there is no experiment {name!r}{hint} (there are {', '.join(known_experiments())})")
    if scale not in known_scales():
        raise ExperimentError(f"there is no scale {scale!r}; there are {', '.join(known_scales())}")
    content = _read(name)
    if missing := {"title", "seeds", "arms"} - content.keys():
        raise ExperimentError(f"recipes/experiments/{name}.yaml does not say {min(missing)!r}")
    chosen = tuple(content["seeds"])
    if seeds is not None and not 1 <= seeds <= len(chosen):
        raise ExperimentError(f"{name} has the seeds {', '.join(map(str, chosen))}: SEEDS is 1 to {len(chosen)}")
    arms = [arm for entry in content["arms"] for arm in _arms(name, entry)]
    only = content.get("only", [arm.label for arm in arms])
    if absent := set(only) - {arm.label for arm in arms}:
        raise ExperimentError(f"recipes/experiments/{name}.yaml has no arm {min(absent)!r}, which 'only' names")
    common: dict[str, Any] = {}
    for patterns in (_read(COMMON).get("scales", {}), content.get("scales", {})):
        for pattern, overrides in patterns.items():
            common |= overrides if fnmatchcase(scale, pattern) else {}
    return Experiment(
        name=name,
        title=content["title"],
        scale=scale,
        arms=tuple(arm for arm in arms if arm.label in only),
        seeds=chosen[:seeds],
        common=tuple(_override(key, value) for key, value in common.items()),
        search=content.get("search"),
    )


def _read(name: str) -> dict[str, Any]:
    """One file, over the one that it extends."""
    content = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    if not isinstance(content, dict):
        raise ExperimentError(f"recipes/experiments/{name}.yaml holds no settings")
    if unknown := content.keys() - KEYS:
        raise ExperimentError(
            f"recipes/experiments/{name}.yaml: {min(unknown)!r} is none of {', '.join(sorted(KEYS))}"
        )
    return _read(content["extends"]) | content if "extends" in content else content


def _arms(name: str, entry: dict[str, Any]) -> Iterator[Arm]:
    """The arms of one entry: one, or one for each combination of its grid."""
    if not isinstance(entry, dict) or not {"label", "recipe"} <= entry.keys() <= ARM_KEYS:
        raise ExperimentError(
            f"recipes/experiments/{name}.yaml: an arm has label and recipe, perhaps overrides and grid, got {entry}"
        )
    fixed = [_override(key, value) for key, value in entry.get("overrides", {}).items()]
    grid = entry.get("grid", {})
    for values in itertools.product(*grid.values()):
        varied = [_override(key, value) for key, value in zip(grid, values, strict=True)]
        yield Arm(entry["label"], entry["recipe"], (*fixed, *varied))


def _override(key: str, value: Any) -> str:
    """`key=value` as Hydra reads it and a folder's name shows it."""
    if isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, bool) or value is None:
        value = yaml.safe_dump(value).split("\n")[0]
    return f"{key}={value}"
