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
from open_r1_capo.runs.exit import run_cli
from open_r1_capo.tasks.data import DataError, last_boxed, load_problems, normalise


def letters(problem: str) -> str:
    """The letters and digits of a problem, in lower case."""
    return re.sub(r"[\W_]+", "", problem).lower()


def overlap(train: Iterable[dict], test: Iterable[dict], key: Callable[[str], str]) -> list[tuple[dict, dict]]:
    """The pairs of a training and a test problem with the same key, in the order of the test set."""
    known = defaultdict(list)
    for row in train:
        known[key(row["problem"])].append(row)
    return [(row, other) for other in test for row in known.get(key(other["problem"]), [])]


def check(name: str, folder: Path | None) -> int:
    """Print which problems a training set shares with the eight test sets; 1 if any (up to white space), else 0."""
    train = load_problems(name, folder).to_list()
    print(f"{name}: {len(train)} problems")
    shared = False
    for benchmark in OPEN:
        try:
            rows = records(benchmark, folder)
        except DataError as error:
            if benchmark.kind != "choice":
                raise
            print(f"{benchmark.title}: not checked: {error}")
            continue
        exact, near = overlap(train, rows, normalise), overlap(train, rows, letters)
        shared = shared or bool(exact)
        counts = f"{len(exact)} shared, {len(near)} with the same letters and digits"
        print(f"{benchmark.title}: {len(rows)} problems, {counts}")
        for row, other in near:
            kind = "same" if (row, other) in exact else "near"
            answers = f"{row['answer']!r} and {last_boxed(other['gold'])!r}"
            start = " ".join(other["problem"].split())[:80]
            print(f"  {kind}  {row.get('id', '')} = {other['id']}: {start}… ({answers})")
    return int(shared)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a training set."""
    parser = argparse.ArgumentParser(prog="make data-check", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the training and test sets, instead of the hub")
    parser.add_argument("--train", default="math_train_12000", help="name of the training set")
    options = parser.parse_args(arguments)
    return run_cli(lambda: check(options.train, options.data))


if __name__ == "__main__":
    sys.exit(main())
