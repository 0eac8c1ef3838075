"""Batches, clocks and memory for the benchmarks."""

from __future__ import annotations

import ctypes
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from open_r1_capo.capo import TokenBatch
from open_r1_capo.capo.engines import native

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """A problem: `tokens` in sequences of `length`, `support` ids each out of `rows` live ones of a vocabulary."""

    tokens: int = 2048
    length: int = 256
    support: int = 50
    dim: int = 896
    rows: int = 5000
    vocab: int = 32768

    def batch(self, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu", common: int = 0) -> TokenBatch:
        """Random tokens; `common` slots of each hold the same few ids, the others any of the live rows.

        Args:
            seed: of the random numbers.
            dtype: of the features.
            device: where the batch lies.
            common: how many slots are common to all tokens, as frequent words are.

        Returns:
            A batch without padding or silent tokens.
        """
        rng = torch.Generator(device).manual_seed(seed)
        n, k = self.tokens, self.support
        # distinct ids at the price of one random number a token: an arithmetic progression modulo the live rows
        first = torch.randint(self.rows - common, (n, 1), generator=rng, device=device)
        steps = torch.arange(k - common, device=device) * (self.rows // max(1, k))
        ids = common + (first + steps) % (self.rows - common)
        ids = torch.cat([torch.arange(common, device=device).expand(n, -1), ids], 1)
        ids = ids * (self.vocab // self.rows)  # spread over the vocabulary
        probs = torch.randn(n, k, generator=rng, device=device).mul_(2).softmax(1)
        return TokenBatch(
            features=torch.randn(n, self.dim, generator=rng, device=device, dtype=torch.float32).to(dtype),
            token_ids=ids,
            probs=probs,
            action_index=torch.multinomial(probs, 1, generator=rng)[:, 0],
            advantages=torch.randn(n, generator=rng, device=device),
        )


def everyone(batch: TokenBatch) -> Tensor:
    """(N,), weights that accept all tokens."""
    return torch.ones(len(batch), device=batch.features.device)


def timed(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Run the functions in turn, `repeats` times after one unmeasured round; one thread.

    Args:
        functions: what to time, by name.
        repeats: rounds.

    Returns:
        Per name `wall_ms`, the median; `cpu_ms`, the median of the processor time, which other work on the machine
        disturbs less; and `least_ms`, its least, which it disturbs least.
    """
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            start_wall, start_cpu = time.perf_counter(), time.process_time()
            function()
            if round_:
                wall[name].append(1e3 * (time.perf_counter() - start_wall))
                cpu[name].append(1e3 * (time.process_time() - start_cpu))
    median = statistics.median
    return {
        name: {"wall_ms": median(wall[name]), "cpu_ms": median(cpu[name]), "least_ms": min(cpu[name])} for name in wall
    }


def extra_peak(function: Callable[[], object]) -> float:
    """MB of resident memory that a call needs at its highest beyond what was resident before it (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1e3


def in_child(script: str, *arguments: str) -> dict:
    """The JSON object that a benchmark script prints last, run in a fresh process."""
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def exponent(factors: list[float], values: list[float]) -> float:
    """The slope of log value against log factor, by least squares."""
    x, y = ([math.log(v) for v in series] for series in (factors, values))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def save(name: str, result: dict) -> None:
    """Write a result with the command and the machine that made it, and say where."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result["made_by"] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "native_engine": native.available(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
