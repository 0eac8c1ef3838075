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
    r"""Read a number such as `4.5 \times 10^{33}`, `4.5e33`, `15,000 \mathrm{~km}` or `-1/3`; None if it is none."""
    text = re.sub(r"^(\s|~|\\[,;:!]|\\approx|\$)+|[\s.$]+$", "", text).replace("{,}", "")
    parts = _NUMBER.fullmatch(text)
    if not parts:
        return None
    exponent = int(parts["braced"] or parts["bare"] or parts["e"] or 0)
    if abs(exponent) > 300 or (parts["divisor"] and float(parts["divisor"]) == 0):
        return None
    return float(parts["lead"].replace(",", "")) / float(parts["divisor"] or 1) * 10.0**exponent


def same_number(gold: str, answer: str) -> bool | None:
    """Compare two boxed numbers with Minerva's tolerance; None if only math-verify can decide."""
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
    """Score items of kind, gold answer and completion: 1.0, 0.0, or None if the gold answer cannot be parsed."""
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
