"""CAPO's cost on a GPU at the paper's shape, in one command: `make bench-gpu`.

For each stage: milliseconds (median of CUDA events), the bytes and operations that it must move or do at least, and
the fraction of the ceiling that this very chip reaches in a plain copy or matrix product. `TRITON_INTERPRET=1 python
benchmarks/gpu.py --tiny` runs the same code on a CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import torch

from common import Shape, everyone, save
from open_r1_capo.capo import AdamStep, Mask, TokenBatch, adam, objective_shift, policy_shift
from open_r1_capo.capo.engines import kernels
from open_r1_capo.capo.segments import ENGINE_VARIABLE
from open_r1_capo.training.features import policy_support

PAPER = Shape(tokens=24 * 1024, length=1024, support=50, dim=3584, rows=20000, vocab=152064)
TINY = Shape(tokens=24, length=8, support=6, dim=40, rows=50, vocab=128)
TILES = [
    {"ENTRIES": entries, "WIDTH": width, "num_warps": warps}
    for entries, width, warps in itertools.product((8, 16, 32), (64, 128, 256), (2, 4, 8))
    if entries * width <= 4096 and entries * width >= 256 * warps
]


class Head(torch.nn.Module):
    """As much of a causal language model as `policy_support` reads."""

    def __init__(self, shape: Shape, device: str):
        super().__init__()
        self.lm_head = torch.nn.Linear(shape.dim, shape.vocab, bias=False, device=device, dtype=torch.bfloat16)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=shape.vocab))

    def get_output_embeddings(self) -> torch.nn.Linear:
        """W."""
        return self.lm_head


def milliseconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """The median duration of a call, after two that compile and warm the caches."""
    times = []
    for round_ in range(repeats + 2):
        if device == "cpu":
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        if round_ >= 2:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def ceilings(device: str, repeats: int, size: int) -> dict[str, float]:
    """GB/s of a copy and TFLOP/s of a bf16 matrix product on this device."""
    source = torch.empty(size * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device, repeats)
    side = 8192 if device == "cuda" else 64
    matrix = torch.randn(side, side, device=device).to(torch.bfloat16)
    product = milliseconds(lambda: matrix @ matrix, device, repeats)
    return {"copy_gb_s": 2 * source.nbytes / copy / 1e6, "matmul_tflop_s": 2 * side**3 / product / 1e9}


def lower_bounds(shape: Shape) -> dict[str, dict[str, float]]:
    """The least that each stage must move and do.

    Args:
        shape: the problem.

    Returns:
        Per stage `gb`, everything read and written once; `gathered_gb`, what passes the second-level cache besides,
        where every (token, id) pair reads its token's features; and `tflop`.
    """
    n, k, d, r, v = shape.tokens, shape.support, shape.dim, shape.rows, shape.vocab
    pairs, features, moments, entries = n * k * d, 2 * n * d, 8 * r * d, 24 * n * k
    billions = {
        "support": (features + 2 * v * d + 12 * n * k, 0, 2 * n * v * d),
        "propose": (features + moments + entries, 2 * pairs, 9 * pairs),
        "select": (20 * n * k, 0, 12 * n * k),
        "commit": (features + 2 * moments + entries, 2 * pairs, 2 * pairs),
        "planned": (features + moments + entries, 2 * pairs, 6 * pairs),
    }
    return {name: {"gb": b / 1e9, "gathered_gb": g / 1e9, "tflop": f / 1e12} for name, (b, g, f) in billions.items()}


def stages(shape: Shape, device: str) -> tuple[AdamStep, TokenBatch, dict[str, Callable[[], object]]]:
    """The moments with all rows live, a batch, and the stages of one step on them."""
    common = shape.support // 2  # half of every support is what every token holds: the worst case of the row sums
    batches = [shape.batch(seed, torch.bfloat16, device, common) for seed in range(3)]
    step, weight = AdamStep(shape.vocab, shape.dim), everyone(batches[0])
    for batch in batches[:2]:
        step.commit(batch, weight)
    batch, head = batches[2], Head(shape, device)
    hidden, actions = batch.features, batch.token_ids[:, 0].contiguous()
    z = step.propose(batch)

    def select() -> object:
        shifts = policy_shift(batch, z, 1e-6), objective_shift(batch, z, 1e-6)
        return Mask(max_policy_shift=1e-4, max_objective_shift=1e-2).judge(*shifts)

    return (
        step,
        batch,
        {
            "support": lambda: policy_support(head, hidden, actions, 0.9, shape.support),
            "propose": lambda: step.propose(batch),
            "select": select,
            "commit": lambda: step.commit(batch, weight),
            "planned": lambda: step.planned(batch),
        },
    )


def extra_mb(function: Callable[[], object], device: str) -> float:
    """The peak of the device's memory during a call, beyond what was allocated before."""
    if device == "cpu":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def check(step: AdamStep, batch: TokenBatch) -> float:
    """The largest relative difference of the kernels' z to torch's in float32, on some tokens."""
    part = batch.select(slice(0, 256))
    expected = adam.propose(step.rule, step.table, part, step.step_count + 1, 2**28)
    return float((step.propose(part) - expected).abs().max() / expected.abs().max())


def tune(functions: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, list]:
    """Every tile's milliseconds for propose and commit, best first; leaves the tile as it was."""
    before, found = dict(kernels.TILE), {"propose": [], "commit": []}
    for tile in TILES:
        kernels.TILE.update(tile)
        for name, results in found.items():
            results.append((milliseconds(functions[name], device, repeats), dict(tile)))
    kernels.TILE.update(before)
    return {name: sorted(results, key=lambda result: result[0]) for name, results in found.items()}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on any device; nothing is saved")
    parser.add_argument("--tune", action="store_true", help="also try every tile size of the kernels")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("no GPU here; --tiny checks the code under TRITON_INTERPRET=1")
    os.environ[ENGINE_VARIABLE] = "triton"
    shape, repeats = (TINY, 1) if options.tiny else (PAPER, options.repeats)
    step, batch, functions = stages(shape, device)
    ceiling, bounds = ceilings(device, repeats, 1 if options.tiny else 2048), lower_bounds(shape)
    result = {"shape": asdict(shape), "ceilings": ceiling, "difference_to_torch": check(step, batch), "stages": {}}
    print(f"{shape}\nceilings {ceiling}; z differs from torch's by {result['difference_to_torch']:.1e}\n")
    heads = ["stage", "ms", "least GB", "gathered GB", "TFLOP", "of copy GB/s", "of matmul TFLOP/s", "extra MB"]
    print(f"| {' | '.join(heads)} |\n|---{'|--:' * 7}|")
    for name, function in functions.items():
        ms, bound, extra = milliseconds(function, device, repeats), bounds[name], extra_mb(function, device)
        moved = (bound["gb"] + bound["gathered_gb"]) / ms * 1e3 / ceiling["copy_gb_s"]
        done = bound["tflop"] / ms * 1e3 / ceiling["matmul_tflop_s"]
        result["stages"][name] = {"ms": ms, **bound, "of_copy": moved, "of_matmul": done, "extra_mb": extra}
        least = " | ".join(f"{value:.3f}" for value in bound.values())
        print(f"| {name} | {ms:.2f} | {least} | {moved:.0%} | {done:.0%} | {extra:.0f} |")
    total = sum(stage["ms"] for stage in result["stages"].values())
    print(f"\nall stages {total:.1f} ms; the paper's Table 1, on 4 × H100: 3990 ms")
    if options.tune:
        result["tiles"] = tune(functions, device, repeats)
        for name, tiles in result["tiles"].items():
            print(f"{name}: " + "; ".join(f"{ms:.2f} ms {tile}" for ms, tile in tiles[:3]))
    if not options.tiny:
        result["gpu"] = torch.cuda.get_device_name()
        save("gpu", result)


if __name__ == "__main__":
    main()
