"""Measures the accuracy reward on real MATH pairs: `python benchmarks/rewards.py FOLDER [PAIRS] [HOSTILE] [WORKERS]`.

FOLDER holds math_train.jsonl. Half of the pairs are right (a problem's own solution), half are wrong (the next
problem's). Prints the throughput of the pool, that of math-verify in one process on a part of the pairs, and whether
hostile answers and a worker killed in mid-batch change any verdict.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence

from open_r1_capo.tasks.data import boxed, read_rows
from open_r1_capo.tasks.verifier import Verifier

HOSTILE = (
    "\\boxed{10^{10^{10}}}",
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{" + "\\frac{1}{" * 3000 + "1" + "}" * 3000 + "}",
    "\\boxed{1000000000!}",
    "x" * 1_000_000,
    "\\boxed{" * 100_000,
    "\0" * 1000,
    "😀" * 100_000,
    "\\boxed{\\frac{1}{2",
    "import os; os.abort()",
)


def pairs(folder: str, count: int) -> list[tuple[str, str]]:
    """Make pairs of a gold answer and a worked solution, every second one of the next problem.

    Args:
        folder: Folder with math_train.jsonl.
        count: Number of pairs.

    Returns:
        The pairs.
    """
    rows = read_rows(f"{folder}/math_train.jsonl")
    return [(boxed(rows[i]["answer"]), rows[(i + i % 2) % len(rows)]["solution"]) for i in range(count)]


def one_process(sample: Sequence[tuple[str, str]]) -> tuple[list[bool | None], float]:
    """Verify with math-verify as it comes, with its own signal timeouts.

    Args:
        sample: The pairs.

    Returns:
        The verdicts and the seconds taken.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.WARNING)
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    parse("\\boxed{1}", targets)
    started, verdicts = time.perf_counter(), []
    for gold, answer in sample:
        golds = parse(gold, targets, extraction_mode="first_match")
        verdicts.append(verify(golds, parse(answer, targets, extraction_mode="first_match")) if golds else None)
    return verdicts, time.perf_counter() - started


def kill_once(pool: Verifier, after: float) -> threading.Thread:
    """Kill one busy worker by SIGKILL.

    Args:
        pool: The pool.
        after: Seconds from now.

    Returns:
        The thread that does it.
    """

    def kill() -> None:
        time.sleep(after)
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def main(folder: str, count: int = 10_000, hostile: int = 50, workers: int = 2) -> None:
    """Measure and print.

    Args:
        folder: Folder with math_train.jsonl.
        count: Number of pairs.
        hostile: Number of hostile answers among them in the second pass.
        workers: Size of the pool.
    """
    real = pairs(folder, count)
    pool = Verifier(workers=workers)
    pool.verify([("1", "\\boxed{1}"), ("1", "\\boxed{2}")])
    started = time.perf_counter()
    verdicts = pool.verify(real)
    seconds = time.perf_counter() - started
    print(f"pool of {workers}: {count} pairs in {seconds:.1f} s, {count / seconds:.0f} a second, {dict(pool.counts)}")
    right, wrong = (sum(verdict is value for verdict in verdicts) for value in (True, False))
    print(f"right {right}, wrong {wrong}, gold not parsable {verdicts.count(None)}")

    part = random.Random(0).sample(range(count), min(1000, count))
    alone, alone_seconds = one_process([real[i] for i in part])
    differing = [i for i, verdict in zip(part, alone, strict=True) if verdict != verdicts[i]]
    rate = len(part) / alone_seconds
    print(f"one process: {rate:.0f} a second; ratio {count / seconds / rate:.2f}; different verdicts {len(differing)}")

    mixed = list(real)
    places = sorted(random.Random(1).sample(range(count), hostile))
    for n, place in enumerate(places):  # a number in front makes each one distinct
        mixed[place] = ("\\boxed{4}", f"{n} {HOSTILE[n % len(HOSTILE)]}")
    fresh = Verifier(workers=workers)
    thread = kill_once(fresh, after=min(5.0, seconds / 4))
    started = time.perf_counter()
    again = fresh.verify(mixed)
    thread.join()
    changed = [i for i in range(count) if i not in set(places) and again[i] != verdicts[i]]
    took = time.perf_counter() - started
    print(f"with {hostile} hostile answers and a killed worker: {took:.1f} s, {dict(fresh.counts)}")
    print(f"results {len(again)}, changed {len(changed)}, hostile scored {sum(again[i] is True for i in places)}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
