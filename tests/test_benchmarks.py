"""The benchmarks run; their numbers are in `benchmarks/results`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script, *arguments, **environment):
    command = [sys.executable, f"benchmarks/{script}", *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_side_by_side_prints_its_table():
    out = run("bench.py", "--quick", "--repeats", "2")
    assert "| materialised |" in out
    assert "| moments' bytes with rows |" in out


def test_the_gpu_benchmark_runs_under_the_interpreter():
    pytest.importorskip("triton")
    out = run("gpu.py", "--tiny", TRITON_INTERPRET="1")
    for stage in ("support", "propose", "select", "commit", "planned"):
        assert f"| {stage} |" in out
