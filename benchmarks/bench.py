"""What CAPO costs on this machine: `make bench` prints one table, with ratios from the same run.

Time: medians over rounds in which the contenders take turns, one thread; wall time, and processor time, which other
work on the machine disturbs less. Memory: the growth of the resident set's peak over a proposal and a commit, in a
process of its own, batch and moments already there. Set OFFICIAL=<checkout of luckeciano/stable-pg-llm> to measure the
authors' modules too.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

import training
from common import Shape, everyone, exponent, in_child, save, timed
from contenders import build
from open_r1_capo.capo import AdamStep

HERE = Path(__file__).parent
LAB = Shape(tokens=2400, length=150, support=60, dim=128, rows=61, vocab=61)
GROWN = {"tokens": "N", "support": "K", "dim": "D", "rows": "rows", "vocab": "V"}


def side_by_side(shape: Shape, names: list[str], repeats: int) -> dict[str, dict]:
    """(a) time of a proposal and a commit, and (b) extra memory, of each contender.

    Args:
        shape: the problem.
        names: the contenders, as `contenders.build` knows them.
        repeats: rounds.

    Returns:
        Per contender, the milliseconds of each call and the extra MB.
    """
    contenders = {name: build(name, shape) for name in names}
    for contender in contenders.values():
        for seed in range(2):  # every row is live
            contender.commit(shape.batch(seed))
    batch, functions = shape.batch(9), {}
    for name, contender in contenders.items():
        functions[f"{name}/propose"] = lambda contender=contender: contender.propose(batch)
        functions[f"{name}/commit"] = lambda contender=contender: contender.commit(batch)
    times = timed(functions, repeats)
    return {
        name: {
            "propose": times[f"{name}/propose"],
            "commit": times[f"{name}/commit"],
            **in_child(str(HERE / "contenders.py"), name, json.dumps(asdict(shape))),
        }
        for name in names
    }


def lab_step(repeats: int) -> dict[str, dict]:
    """Propose, accumulate + commit and planned at the lab policy's shape, where every token holds every row."""
    step, weight = AdamStep(LAB.vocab, LAB.dim), everyone(LAB.batch(0))
    for seed in range(2):
        step.commit(LAB.batch(seed), weight)
    batch = LAB.batch(9)

    def commit() -> None:
        step.accumulate(batch, weight)
        step.commit()

    return timed(
        {"propose": lambda: step.propose(batch), "commit": commit, "planned": lambda: step.planned(batch)}, repeats
    )


def growth(base: Shape, repeats: int) -> dict[str, dict]:
    """(c) propose + commit as N, K, D, the live rows or V double and double again, each alone.

    Args:
        base: where the doubling starts.
        repeats: rounds.

    Returns:
        Per letter, the factors, the least processor milliseconds, and the exponent of their growth.
    """
    results = {}
    for field, letter in GROWN.items():
        factors, functions = [1, 2, 4], {}
        for factor in factors:
            shape = replace(base, **{field: factor * getattr(base, field)})
            step, batch = AdamStep(shape.vocab, shape.dim), shape.batch(9)
            for seed in range(2):
                step.commit(shape.batch(seed), everyone(batch))
            functions[str(factor)] = lambda step=step, batch=batch: (
                step.propose(batch),
                step.commit(batch, everyone(batch)),
            )
        times = [entry["least_ms"] for entry in timed(functions, repeats).values()]
        results[letter] = {"factors": factors, "least_ms": times, "exponent": exponent(factors, times)}
    return results


def table_growth(base: Shape) -> dict[str, object]:
    """Resident memory of the moments as the live rows double, against two float32 of width D a row."""
    factors, grown = [1, 2, 4], []
    for factor in factors:
        shape = replace(base, rows=factor * base.rows, tokens=factor * base.tokens, vocab=factor * base.vocab)
        step = AdamStep(shape.vocab, shape.dim)
        step.commit(shape.batch(0), everyone(shape.batch(0)))
        grown.append(step.table.first.nbytes + step.table.second.nbytes)
    return {"factors": factors, "bytes": grown, "exponent": exponent(factors, grown)}


def print_table(result: dict) -> None:
    """One table of everything that was measured."""
    contenders = result["side_by_side"]
    base = contenders["ours"]

    def both(entry: dict, clock: str) -> float:
        return entry["propose"][clock] + entry["commit"][clock]

    print(f"\nshape {result['shape']}\n")
    print("| implementation | propose ms | commit ms | sum | × ours (wall) | × ours (cpu) | extra MB | × ours |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, entry in contenders.items():
        wall, cpu = (both(entry, clock) / both(base, clock) for clock in ("wall_ms", "cpu_ms"))
        print(
            f"| {name} | {entry['propose']['wall_ms']:.1f} | {entry['commit']['wall_ms']:.1f} "
            f"| {both(entry, 'wall_ms'):.1f} | {wall:.1f} | {cpu:.1f} "
            f"| {entry['extra_mb']:.1f} | {entry['extra_mb'] / max(base['extra_mb'], 0.1):.0f} |"
        )
    lab = {name: entry["wall_ms"] for name, entry in result["lab"].items()}
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in lab.items())
    print(
        f"\nlab shape (N {LAB.tokens}, K {LAB.support}, D {LAB.dim}): {parts}; together {sum(lab.values()):.1f} ms\n"
    )
    print("| doubled alone | ms at × 1, 2, 4 | exponent |\n|---|---|--:|")
    for letter, entry in result["growth"].items():
        print(f"| {letter} | {', '.join(f'{ms:.1f}' for ms in entry['least_ms'])} | {entry['exponent']:.2f} |")
    rows = result["moments"]
    sizes = ", ".join(f"{size / 1e6:.1f} MB" for size in rows["bytes"])
    print(f"| moments' bytes with rows | {sizes} | {rows['exponent']:.2f} |")
    for policy, variants in result.get("training step", {}).items():
        print(f"\n| training step, {policy} | wall ms | cpu ms | × off | × its own rest |\n|---|--:|--:|--:|--:|")
        for variant, entry in variants.items():
            ratios = f"{entry['ratio']:.3f} | {entry['clocked']:.3f}"
            print(f"| {variant} | {entry['wall_ms']:.0f} | {entry['cpu_ms']:.0f} | {ratios} |")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="rounds of the side-by-side comparison")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing saved: does it run?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny = Shape(tokens=32, length=8, support=8, dim=16, rows=64, vocab=128)
    shape = tiny if arguments.quick else Shape()
    base = tiny if arguments.quick else Shape(rows=500)
    names = ["ours", "ours (torch)", "materialised", *(["official"] if os.environ.get("OFFICIAL") else [])]
    result = {
        "shape": asdict(shape),
        "side_by_side": side_by_side(shape, names, arguments.repeats),
        "lab": lab_step(3 * arguments.repeats),
        "growth": growth(base, arguments.repeats),
        "moments": table_growth(base),
    }
    if not arguments.quick:
        result["training step"] = {"lab policy": training.compare(None, 6, 2), "D = 896": training.compare(896, 3, 1)}
    print_table(result)
    if not arguments.quick:
        save("bench", result)


if __name__ == "__main__":
    main()
