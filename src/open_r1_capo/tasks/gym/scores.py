r"""Scores of answers to reasoning-gym problems, by each task's own `score_answer`, in worker processes.

Several tasks give the answer to `eval` or to sympy, which is Python from a language model: a worker may neither write
files nor start programs, and has the time and memory of the verifier's workers. That stops accidents, not an attacker.

    python -m open_r1_capo.tasks.gym.scores SECONDS    # a worker; the pool starts them
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Sequence

from open_r1_capo.tasks.data import stated_answer
from open_r1_capo.tasks.gym.problems import find
from open_r1_capo.tasks.verifier import Verifier, serve

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
READING = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}  # imports do that too
NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?")  # the 3 of 5-3 is not negative
OUTSIDE = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pty.", "mmap.")


class GymVerifier(Verifier):
    """A pool of workers that score (entry, completion) pairs: `verify` gives numbers from 0 to 1.

    Scored is the answer that the completion states; of that, where the right answer is a number, the last number.
    """

    program = ("-m", "open_r1_capo.tasks.gym.scores")

    def job(self, gold: str, answer: str) -> tuple[str, str]:
        """The row's reference as it is, and the stated answer."""
        return gold, stated_answer(answer)


gym_verifier = functools.cache(GymVerifier)  # the pool of this process, started by its first answer


def gym_scores(entries: Sequence[str], texts: Sequence[str]) -> list[float | None]:
    """Score completions of the problems with these references; None where a problem cannot be made again."""
    verdicts = gym_verifier().verify(list(zip(entries, texts, strict=True)))
    return [None if verdict is None else float(verdict) for verdict in verdicts]


# --- in a worker -----------------------------------------------------------------------------------------------------


def _judge(reference: str, answer: str | None) -> float | bool | None:
    """Score in this process; None if there is no such problem. Without an answer, only that is asked."""
    try:
        data, entry = find(reference)
    except (ValueError, KeyError, IndexError):
        return None
    if answer is None:
        return True
    numbers = NUMBER.findall(answer) if NUMBER.fullmatch(entry["answer"] or "") else []
    return float(data.score_answer(numbers[-1] if numbers else answer, entry))


def _refuse(event: str, args: tuple) -> None:
    """Audit hook: no writing, no programs, no network."""
    writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
    if writes or (event.startswith(OUTSIDE) and event not in READING):
        raise PermissionError(f"an answer must not do this: {event}")


def _warm_up() -> None:
    import reasoning_gym  # noqa: F401
    import sympy  # noqa: F401

    sys.addaudithook(_refuse)


if __name__ == "__main__":
    serve(float(sys.argv[1]), _judge, _warm_up)
