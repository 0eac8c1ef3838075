"""A reward function of the user's own: `reward=<python file>:<function>`.

    def reward(completions, answer, **others):
        return [float(answer in text) for text, answer in zip(texts(completions), answer)]

It is called as TRL calls rewards, by name: `completions` (lists of messages), `prompts`, `completion_ids`, and the
data's columns `problem`, `answer` and `solution`; it may name only those that it reads. It returns a number a
completion, None for one that cannot be scored.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from open_r1_capo.runs.exit import UserError


class RewardError(UserError, ValueError):
    """A reward function of the user's own cannot be used."""


def own_reward(name: str) -> Callable[..., list[float | None]]:
    """Load `<python file>:<function>`; its results are checked at every call.

    Raises:
        RewardError: no such file or function, a file that cannot be run, or a result of another kind.
    """
    file, _, function = name.rpartition(":")
    module = _load(Path(file).expanduser())
    found = getattr(module, function, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(function, there, n=1) or there
        raise RewardError(f"{file} has no function {function!r}; it has {', '.join(near) or 'none'}")
    takes = inspect.signature(found).parameters.values()
    everything = any(one.kind is one.VAR_KEYWORD for one in takes)
    names = {one.name for one in takes}

    @functools.wraps(found)
    def checked(completions: list, **columns: Any) -> list[float | None]:
        given = {"completions": completions, **columns}
        rewards = found(**given if everything else {key: value for key, value in given.items() if key in names})
        return _checked(rewards, len(completions), name)

    return checked


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"there is no file {path}: a reward is written <python file>:<function>")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise RewardError(f"{path} is no Python file: a reward is written <python file>:<function>")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        at = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise RewardError(f"{path}{at} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _checked(rewards: Any, count: int, name: str) -> list[float | None]:
    """A float or None a completion; raises RewardError for anything else."""
    try:
        values = [None if one is None else float(one) for one in rewards]
    except (TypeError, ValueError):
        values = None
    if values is None or len(values) != count:
        raise RewardError(
            f"{name} must return a list of {count} numbers, one a completion, and returned {rewards!r:.80}"
        )
    return values
