"""What a generation backend does, and how often it is asked again when it does not answer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from open_r1_capo.runs.exit import UserError

Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt of a call


class GenerationError(UserError, RuntimeError):
    """Completions cannot be generated."""


class Unavailable(GenerationError):
    """A backend does not answer, or not as it should: worth another attempt."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0  # probability that the kept tokens have together
    top_k: int = 0  # tokens kept; 0 keeps all
    min_p: float = 0.0  # tokens below this share of the likeliest one's probability are dropped
    repetition_penalty: float = 1.0  # 1 is none
    stop_token_ids: tuple[int, ...] = ()  # any of them ends a completion, and is its last token
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of vLLM's sampling parameters

    def request(self) -> dict[str, Any]:
        """The fields of a vLLM request, without its seed and its number of completions."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        plain = {name: getattr(self, name) for name in names}
        # 0: of the sampled tokens alone
        return {**plain, "stop_token_ids": list(self.stop_token_ids), "logprobs": 0, **self.extra}


@dataclass(frozen=True)
class Completion:
    """One completion."""

    ids: list[int]  # with the token that ended it
    logps: list[float]  # of each token under the sampling distribution; NaN where unknown


class Backend(ABC):
    """Something that holds a copy of the policy and samples from it; GenerationError says that it is gone for good."""

    shared = False  # one backend serves all training processes; otherwise each has its own

    @abstractmethod
    def start(self) -> None:
        """Wait until it is ready; raises GenerationError if it cannot be used."""

    @abstractmethod
    def sync(self, folder: Path) -> None:
        """Take new weights, `model.safetensors` in a folder that stays until the next call."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Draw a completion of every prompt (token ids); equal neighbours may be drawn together.

        The i-th completion is drawn with seed + i, whatever else is drawn beside it.
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything; safe to call twice."""


def retry(
    action: Callable[[], Result],
    recover: Callable[[], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """Call an action until it is available, at most `len(WAITS) + 1` times, with `recover` before each new attempt."""
    for number, wait in enumerate(WAITS):
        try:
            if number:
                recover()
            return action()
        except Unavailable:
            sleep(wait)
    recover()
    return action()
