r"""The lab's task: sums of a few small numbers, answered in ``\boxed{}`` so that the real reward scores them.

Every function is pure and deterministic in its seed. Problems are split by their terms: whatever the wording or the
order, a multiset of terms belongs either to ``train`` (pretraining and reinforcement learning) or to ``test``.

Completions are a dozen tokens long. With filler (`Mixture.filler_words`) each part of one comes after made-up words of
Zipf frequency: completions of hundreds of tokens, most of them uncertain and without effect on the answer.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

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
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"  # of the filler words, two syllables each
FILLER_WORDS = (len(CONSONANTS) * len(VOWELS)) ** 2

Filler = Callable[[random.Random], str]  # gives the words before one part of a completion


@dataclass(frozen=True)
class Variant:
    """One family of problems."""

    terms: Callable[[random.Random], tuple[int, ...]]  # draws the signed terms of one problem
    wording: Callable[[tuple[int, ...]], str]  # turns them into the user's message


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
    """`test` for one multiset of terms in five, else `train`, whatever the wording and the order of the terms."""
    # A checksum and not hash(): Python's own hash of a string changes from process to process.
    return "test" if zlib.crc32(repr(sorted(terms)).encode()) % TEST_SHARE == 0 else "train"


def draw_terms(rng: random.Random, split: str, variant: str = "base") -> tuple[int, ...]:
    """Draw the signed terms of one problem of a split; raises ValueError for an unknown split or variant."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
    while True:
        terms = VARIANTS[variant].terms(rng)
        if split_of(terms) == split:
            return terms


def problems(split: str, n: int, seed: int = 0, variant: str = "base") -> list[dict[str, str]]:
    """State n problems, `problem` and `answer` (an integer as text); the first m of them do not depend on n."""
    rng = random.Random(f"{seed}/{split}/{variant}")
    rows = []
    for _ in range(n):
        terms = draw_terms(rng, split, variant)
        rows.append({"problem": VARIANTS[variant].wording(terms), "answer": str(sum(terms))})
    return rows


def boxed(answer: int | str) -> str:
    r"""The answer as the reward expects it: ``\boxed{answer}``."""
    return rf"\boxed{{{answer}}}"


def filler_vocabulary(size: int) -> list[str]:
    """Made-up words, at most `FILLER_WORDS`, the most frequent first; larger vocabularies begin with smaller ones."""
    syllables = [c + v for c, v in itertools.product(CONSONANTS, VOWELS)]
    words = [f"{first}{second} " for first, second in itertools.product(syllables, syllables)]
    random.Random("filler").shuffle(words)
    return words[:size]


@lru_cache(maxsize=8)
def _zipf(size: int, exponent: float) -> tuple[list[str], list[float]]:
    """Words and their cumulative weights: the r-th word has weight r^-exponent."""
    weights = (rank**-exponent for rank in range(1, size + 1))
    return filler_vocabulary(size), list(itertools.accumulate(weights))


def no_filler(rng: random.Random) -> str:
    """No words."""
    return ""


def zipf_filler(mean: float, size: int, exponent: float) -> Filler:
    """Make a filler of on average `mean` words, the r-th most frequent of `size` with a frequency ∝ r^-exponent."""
    if mean == 0:
        return no_filler
    words, weights = _zipf(size, exponent)

    def draw(rng: random.Random) -> str:
        # Not a random number of words: two layers find the next term by its distance, and learn sums across gaps of
        # any length far too slowly.
        return "".join(rng.choices(words, cum_weights=weights, k=int(mean + rng.random())))

    return draw


def worked_solution(
    terms: tuple[int, ...],
    rng: random.Random,
    slip: float = 0.0,
    shortcut: float = 0.0,
    filler: Filler = no_filler,
) -> str:
    r"""Write the running sums of at least two terms, as ``3+5=8, 8+7=15, \boxed{15}``.

    Args:
        terms: With their signs.
        rng: Source of slips and shortcuts.
        slip: Probability that one running sum is off by one or two; later sums go on from the wrong one.
        shortcut: Probability that a step adds two terms at once, as ``3+5+7=15``, where two are left.
        filler: Source of the words before each running sum and before the answer.
    """
    total, rest, text = terms[0], list(terms[1:]), ""
    while rest:
        n = 2 if len(rest) > 1 and rng.random() < shortcut else 1
        taken, rest = rest[:n], rest[n:]
        result = total + sum(taken)
        if rng.random() < slip:
            result = max(0, result + rng.choice((-2, -1, 1, 2)))
        text += f"{filler(rng)}{total}{''.join(f'{t:+d}' for t in taken)}={result}, "
        total = result
    return text + filler(rng) + boxed(total)


def direct_answer(terms: tuple[int, ...], rng: random.Random, right: float, filler: Filler = no_filler) -> str:
    """Write an answer without any work: right with probability `right`, else near the right one."""
    answer = sum(terms)
    if rng.random() >= right:
        answer = max(0, answer + rng.choice((-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)))
    opening = rng.choice(OPENINGS)
    return filler(rng) + opening + filler(rng) + boxed(answer) + "."


def ramble(rng: random.Random, filler: Filler = no_filler) -> str:
    """Write one to three sentences that never come to an answer, with filler before each."""
    return " ".join(filler(rng) + sentence for sentence in rng.sample(RAMBLES, rng.randint(1, 3)))
