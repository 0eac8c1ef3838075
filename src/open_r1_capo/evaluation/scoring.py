r"""How answers of the test sets are scored: the training reward's verifier, with two exceptions.

- `number` (MinervaMath): a gold answer that is a number is compared by value with 1 % relative tolerance, the
  threshold of the Minerva paper (arXiv 2206.14858). math-verify rounds to 6 decimals, so that
  1e-8 and 2e-10 are equal to it.
- `choice` (GPQA): the letter in the box, else the last letter that is stated as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from open_r1_capo.tasks.data import last_boxed
from open_r1_capo.tasks.verifier import Verifier, default_verifier

TOLERANCE = 0.01
SMALL = 1e-3  # below this, math-verify's rounding makes different numbers equal

_UNIT = r"(\\?\s|~|\\[,;:!]|\{\}|\\(mathrm|text|operatorname|rm|mathit)\s*\{[^{}]*\})*"
_NUMBER = re.compile(
    r"(?P<lead>[-+]?(\d[\d,]*\.?\d*|\.\d+))\s*(/\s*(?P<divisor>\d+\.?\d*))?"
    r"(\s*(\\times|\\cdot|\*|×|x)\s*10\s*(\^|\*\*)\s*(\{\s*(?P<braced>[-+]?\d+)\s*\}|(?P<bare>[-+]?\d+))"
    r"|[eE](?P<e>[-+]?\d+))?" + _UNIT
)


def number(text: str) -> float | None:
    r"""Read a number in decimal or scientific notation, with or without a unit; None if the text is something else.

    Args:
        text: such as `4.5 \times 10^{33}`, `4.5e33`, `15,000 \mathrm{~km}`, or `-1/3`.
    """
    text = re.sub(r"^(\s|~|\\[,;:!]|\\approx|\$)+|[\s.$]+$", "", text).replace("{,}", "")
    parts = _NUMBER.fullmatch(text)
    if not parts:
        return None
    exponent = int(parts["braced"] or parts["bare"] or parts["e"] or 0)
    if abs(exponent) > 300 or (parts["divisor"] and float(parts["divisor"]) == 0):
        return None
    return float(parts["lead"].replace(",", "")) / float(parts["divisor"] or 1) * 10.0**exponent


def same_number(gold: str, answer: str) -> bool | None:
    """Compare two numbers with Minerva's tolerance.

    Args:
        gold: the gold answer, in a box.
        answer: a completion.

    Returns:
        The verdict, or None if the gold answer is no number, or the answer could equal it in another notation.
    """
    right, given = number(last_boxed(gold) or ""), number(last_boxed(answer) or "")
    if right is None:
        return None
    if given is None:
        return None if right == 0 or abs(right) >= SMALL else False
    return abs(given - right) <= TOLERANCE * abs(right)


def choice(answer: str) -> str | None:
    """The letter A, B, C or D that a completion chooses; None if it chooses none."""
    box = last_boxed(answer)
    if box is not None:
        letter = re.fullmatch(r"[\s({\[]*([A-Da-d])[\s)}\].:]*", re.sub(r"\\(text|mathrm|textbf|mathbf)", "", box))
        return letter[1].upper() if letter else None
    stated = re.findall(r"answer(?: is|:)\s*\**\s*\(?([A-D])\b", answer)
    return stated[-1] if stated else None


def score(items: Sequence[tuple[str, str, str]], verifier: Verifier | None = None) -> list[float | None]:
    """Score answers.

    Args:
        items: kind, gold answer and completion of each.
        verifier: the pool to use, by default that of the accuracy reward.

    Returns:
        1.0 or 0.0 for each, in order; None where the gold answer cannot be parsed.
    """
    verdicts: list[bool | None] = []
    for kind, gold, answer in items:
        if kind == "choice":
            verdicts.append(choice(answer) == gold)
        else:
            verdicts.append(same_number(gold, answer) if kind == "number" else None)
    undecided = [index for index, verdict in enumerate(verdicts) if verdict is None]
    pairs = [items[index][1:] for index in undecided]
    for index, verdict in zip(undecided, (verifier or default_verifier()).verify(pairs), strict=True):
        verdicts[index] = verdict
    return [None if verdict is None else float(verdict) for verdict in verdicts]
