r"""Rewards under Open-R1's names, accuracy (math-verify), format and tag_count; the paper's and reasoning-gym's.

    accuracy, layout = get_reward_funcs(["accuracy", "format"])
    accuracy(["so it is \\boxed{4}"], solution=["4"])  # [1.0]; None where the gold answer cannot be parsed

A reward takes completions, conversational or plain, and the data set's other columns by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

from open_r1_capo.tasks.gym.scores import gym_scores
from open_r1_capo.tasks.own_reward import own_reward
from open_r1_capo.tasks.verifier import Verifier, default_verifier, strict_verifier

logger = logging.getLogger(__name__)


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion, plain or conversational (its last message)."""
    if isinstance(completion, str):
        return completion
    return (completion[-1].get("content") or "") if completion else ""


def accuracy_reward(
    completions: list, solution: list[str] | None = None, entry: list[str] | None = None, **kwargs: object
) -> list[float | None]:
    """1.0 for a right answer, else 0.0; None if that cannot be said.

    Right is what equals the gold answer mathematically: `solution` has one a completion, a box, LaTeX, a number, or a
    solution that ends in one. Of problems of reasoning-gym, which have an `entry`, it is what their task scores 1.

    Raises:
        ValueError: If `solution` is missing or of another length.
    """
    if entry is not None:
        return [None if score is None else float(score >= 1) for score in score_reward(completions, entry)]
    verdicts = _verdicts(default_verifier(), completions, solution)
    if None in verdicts:
        logger.warning("%d samples left out: their gold answer cannot be parsed", verdicts.count(None))
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def strict_accuracy_reward(
    completions: list, solution: list[str] | None = None, entry: list[str] | None = None, **kwargs: object
) -> list[float | None]:
    """1.0 for a *boxed or stated* answer that equals the gold answer mathematically, and where that cannot be parsed.

    As in the authors' code: an answer in its last sentence alone, such as "so x = 4", is wrong. Arguments and errors
    are those of `accuracy_reward`, which scores problems of reasoning-gym.
    """
    if entry is not None:
        return accuracy_reward(completions, entry=entry)
    verdicts = _verdicts(strict_verifier(), completions, solution)
    return [1.0 if verdict is None else float(verdict) for verdict in verdicts]


def _verdicts(verifier: Verifier, completions: list, solution: list[str] | None) -> list[bool | None]:
    if solution is None or len(solution) != len(completions):
        found = "no column" if solution is None else f"{len(solution)} values"
        raise ValueError(f"the accuracy reward needs `solution` for {len(completions)} completions; there is {found}")
    pairs = [(gold or "", completion_text(text)) for gold, text in zip(solution, completions, strict=True)]
    return verifier.verify(pairs)


def score_reward(completions: list, entry: list[str], **kwargs: object) -> list[float | None]:
    """What the task of reasoning-gym gives, from 0 to 1: many give part of the reward to an answer that is near."""
    return gym_scores(entry, [completion_text(completion) for completion in completions])


def format_reward(completions: list, **kwargs: object) -> list[float]:
    r"""1.0 for one leading `<think>…</think>` followed by an answer in `\boxed{}` or `<answer></answer>`, else 0.0."""
    layout = re.compile(r"\s*<think>.*</think>.*(\\boxed\{|<answer>.*</answer>)", re.DOTALL)
    texts = [completion_text(completion) for completion in completions]
    return [float(text.count("think>") == 2 and bool(layout.match(text))) for text in texts]


def tag_count_reward(completions: list, **kwargs: object) -> list[float]:
    r"""Reward a quarter for each of four marks that occurs exactly once: think, /think, answer, /answer.

    A `\boxed{` that occurs once after the reasoning stands for both answer tags.
    """
    scores = []
    for text in map(completion_text, completions):
        tags = [text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")]
        boxed = text.rpartition("</think>")[2].count("\\boxed{") == 1
        scores.append((sum(tags[:2]) + (2 if boxed else sum(tags[2:]))) / 4)
    return scores


REWARDS: dict[str, Callable] = {
    "accuracy": accuracy_reward,
    "strict_accuracy": strict_accuracy_reward,
    "format": format_reward,
    "tag_count": tag_count_reward,
    "score": score_reward,
}


def get_reward_funcs(names: Sequence[str]) -> list[Callable]:
    """The reward functions of some names, `<python file>:<function>` for one's own; raises ValueError if unknown."""
    return [own_reward(name) if ":" in name else _known(name) for name in names]


def _known(name: str) -> Callable:
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name}; known: {', '.join(REWARDS)}, or <python file>:<function>")
    return REWARDS[name]
