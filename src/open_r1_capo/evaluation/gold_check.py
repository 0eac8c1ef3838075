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
from open_r1_capo.evaluation.suite import Benchmark, boxed, records, select
from open_r1_capo.tasks.data import DataError, last_boxed, read_rows


def sentence(gold: str, kind: str) -> str:
    r"""Wrap a gold answer as a model would state it.

    Args:
        gold: The gold answer: a box, or a letter.
        kind: Kind of the test set.

    Returns:
        `Adding everything up, the final answer is $\boxed{…}$.` with the answer in it.
    """
    box = f"\\boxed{{{gold}}}" if kind == "choice" else gold
    return f"<think>Let me see: 1, 2, 3.</think>\nPutting it together, we get ${box}$ as the result."


def check(rows: Sequence[dict], originals: Sequence[str]) -> tuple[list[tuple], list[tuple]]:
    """Score each gold answer with itself and with another problem's.

    Args:
        rows: Records of a test set.
        originals: The source's own spelling of each gold answer, in a box, which is what a model would write.

    Returns:
        The exceptions: (id, gold, score) of answers that are not right, (id, gold, other) of swaps that are not wrong.
    """
    own = score([(r["kind"], r["gold"], sentence(o, r["kind"])) for r, o in zip(rows, originals, strict=True)])
    wrong = [(r["id"], r["gold"], s) for r, s in zip(rows, own, strict=True) if s != 1.0]
    swapped, n = [], len(rows)
    for i, row in enumerate(rows):
        others = (originals[(i + step) % n] for step in range(1, n))
        other = next((o for o in others if o.strip() not in (originals[i].strip(), row["gold"])), None)
        if other is not None:
            swapped.append((row, other))
    scores = score([(row["kind"], row["gold"], sentence(other, row["kind"])) for row, other in swapped])
    right = [(row["id"], row["gold"], other) for (row, other), s in zip(swapped, scores, strict=True) if s != 0.0]
    return wrong, right


def original_answers(benchmark: Benchmark, folder: str, rows: Sequence[dict]) -> list[str]:
    """Return the answers as the local file spells them, in boxes.

    Args:
        benchmark: The test set.
        folder: Folder of the local files.
        rows: Its records.

    Returns:
        One boxed answer a record (the letter itself for choices).
    """
    if benchmark.kind == "choice":
        return [row["gold"] for row in rows]
    return [boxed(str(row["answer"])) for row in read_rows(f"{folder}/{benchmark.name}.jsonl")]


def wanted(folder: str, names: Sequence[str]) -> list[Benchmark]:
    """Choose the test sets to check; GPQA-Diamond has letters for answers, and no local file.

    Args:
        folder: Folder of the local files.
        names: Test sets; all that the folder holds if empty.

    Returns:
        The test sets.

    Raises:
        DataError: If there are none, or a name is unknown.
    """
    files = {path.stem for path in Path(folder).glob("*.jsonl")}
    chosen = [b for b in select(",".join(names) or "open") if b.kind != "choice" and (names or b.name in files)]
    if not chosen:
        raise DataError(f"the data folder {folder} holds no test set to check, such as gsm8k.jsonl")
    return chosen


def main(arguments: Sequence[str]) -> int:
    """Check the test sets of a folder and print what is found.

    Args:
        arguments: Without the program's name.

    Returns:
        Exit code: 0, or 2 for a mistake that a sentence explains.
    """
    parser = argparse.ArgumentParser(prog="make eval-gold", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of the local files")
    parser.add_argument("names", nargs="*", help="test sets to check; all that the folder holds if empty")
    options = parser.parse_args(arguments)
    try:
        for benchmark in wanted(options.folder, options.names):
            started = time.perf_counter()
            rows = records(benchmark, options.folder)
            wrong, right = check(rows, original_answers(benchmark, options.folder, rows))
            counts = f"gold not 1: {len(wrong)}, swapped not 0: {len(right)}"
            print(f"{benchmark.name}: {len(rows)}: {counts}, {time.perf_counter() - started:.0f} s")
            for identity, gold, got in wrong:
                print(f"  gold  {identity}: {last_boxed(gold)!r} scores {got}")
            for identity, gold, other in right:
                print(f"  swap  {identity}: {last_boxed(gold)!r} accepts {last_boxed(other)!r}")
    except DataError as error:
        print(f"eval-gold: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
