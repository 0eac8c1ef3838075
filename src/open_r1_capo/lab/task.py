r"""The lab's task: sums of a few small numbers, answered in ``\boxed{}`` so that the real reward scores them.

Every function is pure and deterministic in its seed. Problems are split by their terms: whatever the wording or the
order, a multiset of terms belongs either to ``train`` (pretraining and reinforcement learning) or to ``test``.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

SPLITS = ("train", "test")
TEST_SHARE = 5  # one multiset of terms in five is held out

OPENINGS = ("The answer is ", "It is ", "I guess ", "Clearly ", "That makes ", "So ")
RAMBLES = (
    "Let me think about it.",
    "Hmm, I lost count.",
    "I should add these numbers.",
    "We can do this step by step.",
    "This sum looks hard.",
    "Wait, let me start again.",
)


@dataclass(frozen=True)
class Variant:
    """One family of problems.

    Attributes:
        terms: Draws the signed terms of one problem from a random generator.
        wording: Turns the terms into the user's message.
    """

    terms: Callable[[random.Random], tuple[int, ...]]
    wording: Callable[[tuple[int, ...]], str]


def _digits(rng: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(rng.randint(1, 9) for _ in range(rng.randint(low, high)))


def _repeated(rng: random.Random) -> tuple[int, ...]:
    values = rng.sample(range(1, 10), 2)
    return tuple(rng.choice(values) for _ in range(rng.randint(3, 5)))


def _minus(rng: random.Random) -> tuple[int, ...]:
    terms = _digits(rng, 2, 4)
    return (*terms, -rng.randint(1, min(9, sum(terms))))


def _formula(terms: tuple[int, ...]) -> str:
    return "What is " + "".join(f"{t:+d}" for t in terms).removeprefix("+") + "?"


def _list(terms: tuple[int, ...]) -> str:
    *head, last = terms
    return "Please add up " + ", ".join(map(str, head)) + f" and {last}."


def _story(terms: tuple[int, ...]) -> str:
    return f"Ann finds {terms[0]} shells, " + ", ".join(f"then {t}" for t in terms[1:]) + ". How many in all?"


VARIANTS: dict[str, Variant] = {
    "base": Variant(lambda rng: _digits(rng, 3, 5), _formula),
    "fewer_terms": Variant(lambda rng: (rng.randint(1, 30), rng.randint(1, 9)), _formula),
    "more_terms": Variant(lambda rng: _digits(rng, 6, 6), _formula),
    "larger_numbers": Variant(lambda rng: (rng.randint(10, 40), *_digits(rng, 2, 3)), _formula),
    "repeated_terms": Variant(_repeated, _formula),
    "subtraction": Variant(_minus, _formula),
    "other_wording": Variant(lambda rng: _digits(rng, 3, 5), _list),
    "story": Variant(lambda rng: _digits(rng, 3, 5), _story),
}


def split_of(terms: tuple[int, ...]) -> str:
    """Say to which split a problem belongs, whatever its wording and the order of its terms.

    Args:
        terms: Signed terms of the sum.

    Returns:
        ``"test"`` for one multiset of terms in five, else ``"train"``.
    """
    # A checksum and not hash(): Python's own hash of a string changes from process to process.
    return "test" if zlib.crc32(repr(sorted(terms)).encode()) % TEST_SHARE == 0 else "train"


def draw_terms(rng: random.Random, split: str, variant: str = "base") -> tuple[int, ...]:
    """Draw the terms of one problem of a split by rejection.

    Args:
        rng: Source of randomness; it is advanced.
        split: ``"train"`` or ``"test"``.
        variant: A key of `VARIANTS`.

    Returns:
        The signed terms.

    Raises:
        ValueError: If the split or the variant is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
    while True:
        terms = VARIANTS[variant].terms(rng)
        if split_of(terms) == split:
            return terms


def problems(split: str, n: int, seed: int = 0, variant: str = "base") -> list[dict[str, str]]:
    """State n problems; small variants repeat some.

    Args:
        split: ``"train"`` or ``"test"``; no multiset of terms is in both.
        n: Number of problems.
        seed: Decides which problems; the first m of n problems do not depend on n.
        variant: A key of `VARIANTS`.

    Returns:
        n rows with ``problem`` (the user's message) and ``answer`` (a decimal number as text).
    """
    rng = random.Random(f"{seed}/{split}/{variant}")
    rows = []
    for _ in range(n):
        terms = draw_terms(rng, split, variant)
        rows.append({"problem": VARIANTS[variant].wording(terms), "answer": str(sum(terms))})
    return rows


def boxed(answer: int | str) -> str:
    r"""Write an answer as the reward expects it.

    Args:
        answer: The number.

    Returns:
        ``\boxed{answer}``.
    """
    return rf"\boxed{{{answer}}}"


def worked_solution(
    terms: tuple[int, ...], rng: random.Random | None = None, slip: float = 0.0, shortcut: float = 0.0
) -> str:
    r"""Write the running sums of a problem, as ``3+5=8, 8+7=15, \boxed{15}``.

    Args:
        terms: Signed terms, at least two.
        rng: Source of slips and shortcuts; needed when either is possible.
        slip: Probability that one running sum is off by one or two; later sums go on from the wrong one.
        shortcut: Probability that a step adds two terms at once, as ``3+5+7=15``, where two are left.

    Returns:
        The completion's text.

    Raises:
        ValueError: If slips or shortcuts are asked for without a source of randomness.
    """
    if rng is None:
        if slip > 0 or shortcut > 0:
            raise ValueError("slips and shortcuts need a random generator")
        rng = random.Random(0)
    total, rest, text = terms[0], list(terms[1:]), ""
    while rest:
        n = 2 if len(rest) > 1 and rng.random() < shortcut else 1
        taken, rest = rest[:n], rest[n:]
        result = total + sum(taken)
        if rng.random() < slip:
            result = max(0, result + rng.choice((-2, -1, 1, 2)))
        text += f"{total}{''.join(f'{t:+d}' for t in taken)}={result}, "
        total = result
    return text + boxed(total)


def direct_answer(terms: tuple[int, ...], rng: random.Random, right: float) -> str:
    """Write an answer without any work, often a wrong one near the right one.

    Args:
        terms: Signed terms.
        rng: Source of randomness; it is advanced.
        right: Probability of the right answer.

    Returns:
        The completion's text.
    """
    answer = sum(terms)
    if rng.random() >= right:
        answer = max(0, answer + rng.choice((-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)))
    return rng.choice(OPENINGS) + boxed(answer) + "."


def ramble(rng: random.Random) -> str:
    """Write one to three sentences that never come to an answer.

    Args:
        rng: Source of randomness; it is advanced.

    Returns:
        The completion's text.
    """
    return " ".join(rng.sample(RAMBLES, rng.randint(1, 3)))


@dataclass(frozen=True)
class Mixture:
    """How the pretraining texts are mixed; the rest of the completions ramble.

    Attributes:
        base: Share of problems of the base variant; the others share the rest equally.
        worked: Share of worked running sums.
        direct: Share of direct answers.
        slip: Probability of a slip at one running sum.
        shortcut: Probability that a step adds two terms at once, which the policy does badly.
        right: Probability that a direct answer is right.
    """

    base: float = 0.5
    worked: float = 0.4
    direct: float = 0.4
    slip: float = 0.06
    shortcut: float = 0.2
    right: float = 0.35


def pretraining_text(rng: random.Random, mixture: Mixture) -> tuple[str, str]:
    """Draw one problem of the train split, of any variant, with a completion of any style.

    Args:
        rng: Source of randomness; it is advanced.
        mixture: Shares of variants and styles.

    Returns:
        The user's message and the completion.
    """
    others = [name for name in VARIANTS if name != "base"]
    variant = "base" if rng.random() < mixture.base else rng.choice(others)
    terms = draw_terms(rng, "train", variant)
    style = rng.random()
    if style < mixture.worked:
        completion = worked_solution(terms, rng, mixture.slip, mixture.shortcut)
    elif style < mixture.worked + mixture.direct:
        completion = direct_answer(terms, rng, mixture.right)
    else:
        completion = ramble(rng)
    return VARIANTS[variant].wording(terms), completion
