"""Checks the scoring against the gold answers themselves: `make eval-gold DATA=<folder> [TASKS=…]`.

Each gold answer, in a sentence and a box, must score 1; the next different gold answer of the same set must score 0.
Every exception is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from open_r1_capo.evaluation.scoring import score
from open_r1_capo.evaluation.suite import Benchmark, records, select
from open_r1_capo.runs.exit import run_cli
from open_r1_capo.tasks.data import DataError, boxed, last_boxed, read_rows


def sentence(boxed_gold: str) -> str:
    """State a gold answer, in its box, as a model would."""
    return f"<think>Let me see: 1, 2, 3.</think>\nPutting it together, we get ${boxed_gold}$ as the result."


def check(rows: Sequence[dict], originals: Sequence[str]) -> tuple[list[tuple], list[tuple]]:
    """Score each gold answer with itself and with another problem's; `originals` are the source's boxed spellings.

    Returns:
        The exceptions: (id, gold, score) of answers scored wrong, (id, gold, other) of swapped answers scored right.
    """
    own = score([(r["kind"], r["gold"], sentence(o)) for r, o in zip(rows, originals, strict=True)])
    wrong = [(r["id"], r["gold"], s) for r, s in zip(rows, own, strict=True) if s != 1.0]
    swapped, n = [], len(rows)
    for i, row in enumerate(rows):
        others = (originals[(i + step) % n] for step in range(1, n))
        other = next((o for o in others if o.strip() not in (originals[i].strip(), row["gold"])), None)
        if other is not None:
            swapped.append((row, other))
    scores = score([(row["kind"], row["gold"], sentence(other)) for row, other in swapped])
    right = [(row["id"], row["gold"], other) for (row, other), s in zip(swapped, scores, strict=True) if s != 0.0]
    return wrong, right


def original_answers(benchmark: Benchmark, folder: str) -> list[str]:
    """The answers as the local file spells them, in boxes."""
    return [boxed(str(row["answer"])) for row in read_rows(f"{folder}/{benchmark.name}.jsonl")]


def wanted(folder: str, names: Sequence[str]) -> list[Benchmark]:
    """The named test sets, or all in the folder; a DataError if there are none. GPQA-Diamond has no local file."""
    files = {path.stem for path in Path(folder).glob("*.jsonl")}
    chosen = [b for b in select(",".join(names)) if b.kind != "choice" and (names or b.name in files)]
    if not chosen:
        raise DataError(f"the data folder {folder} holds no test set to check, such as gsm8k.jsonl")
    return chosen


def check_folder(folder: str, names: Sequence[str]) -> None:
    """Check the test sets of a folder and print every exception."""
    for benchmark in wanted(folder, names):
        started = time.perf_counter()
        rows = records(benchmark, folder)
        wrong, right = check(rows, original_answers(benchmark, folder))
        counts = f"gold not 1: {len(wrong)}, swapped not 0: {len(right)}"
        print(f"{benchmark.name}: {len(rows)}: {counts}, {time.perf_counter() - started:.0f} s")
        for identity, gold, got in wrong:
            print(f"  gold  {identity}: {last_boxed(gold)!r} scores {got}")
        for identity, gold, other in right:
            print(f"  swap  {identity}: {last_boxed(gold)!r} accepts {last_boxed(other)!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the test sets of a folder."""
    parser = argparse.ArgumentParser(prog="make eval-gold", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of the local files")
    parser.add_argument("names", nargs="*", help="test sets to check; all that the folder holds if empty")
    options = parser.parse_args(arguments)
    return run_cli(lambda: check_folder(options.folder, options.names))


if __name__ == "__main__":
    sys.exit(main())
