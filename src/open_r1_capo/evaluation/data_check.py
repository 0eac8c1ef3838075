"""Lists problems of a training set that are also in a test set: `make data-check [DATA=<folder>] [TRAIN=<name>]`.

Two measures: the same text up to white space, and the same letters and digits with everything else removed. The second
also finds pairs that differ in a sign, which are two problems; each hit is listed with both answers for that reason.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from open_r1_capo.evaluation.suite import OPEN, records
from open_r1_capo.tasks.data import DataError, last_boxed, load_problems, normalise


def letters(problem: str) -> str:
    """Keep the letters and digits of a problem, in lower case.

    Args:
        problem: Its text.

    Returns:
        The text without anything else.
    """
    return re.sub(r"[\W_]+", "", problem).lower()


def overlap(train: Iterable[dict], test: Iterable[dict], key: Callable[[str], str]) -> list[tuple[dict, dict]]:
    """Find the pairs of problems with the same key.

    Args:
        train: Training problems.
        test: Problems of a test set.
        key: What makes two problems the same.

    Returns:
        The pairs, in the order of the test set.
    """
    known = defaultdict(list)
    for row in train:
        known[key(row["problem"])].append(row)
    return [(row, other) for other in test for row in known.get(key(other["problem"]), [])]


def check(train: Sequence[dict], folder: Path | None) -> int:
    """Compare a training set with the eight test sets and print what they share.

    Args:
        train: Training problems.
        folder: Folder of the test sets, or None for the hub.

    Returns:
        The number of problems shared up to white space.

    Raises:
        DataError: If a test set cannot be read, GPQA-Diamond excepted.
    """
    shared = 0
    for benchmark in OPEN:
        try:
            rows = records(benchmark, folder)
        except DataError as error:
            if benchmark.kind != "choice":
                raise
            print(f"{benchmark.title}: not checked: {error}")
            continue
        exact, near = overlap(train, rows, normalise), overlap(train, rows, letters)
        shared += len(exact)
        counts = f"{len(exact)} shared, {len(near)} with the same letters and digits"
        print(f"{benchmark.title}: {len(rows)} problems, {counts}")
        for row, other in near:
            kind = "same" if (row, other) in exact else "near"
            answers = f"{row['answer']!r} and {last_boxed(other['gold'])!r}"
            start = " ".join(other["problem"].split())[:80]
            print(f"  {kind}  {row.get('id', '')} = {other['id']}: {start}… ({answers})")
    return shared


def main(arguments: Sequence[str]) -> int:
    """Check a training set.

    Args:
        arguments: Without the program's name.

    Returns:
        Exit code: 0, 1 if problems are shared, 2 for a mistake that a sentence explains.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the training and test sets, instead of the hub")
    parser.add_argument("--train", default="math_train_12000", help="name of the training set")
    options = parser.parse_args(arguments)
    try:
        train = load_problems(options.train, options.data).to_list()
        print(f"{options.train}: {len(train)} problems")
        return int(check(train, options.data) > 0)
    except DataError as error:
        print(f"data-check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
