"""The engines of `AdamStep`, torch, C and Triton, against each other and against the paper's materialised form."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.materialised import MaterialisedAdam

from open_r1_capo.capo import AdamStep, adam, engines
from open_r1_capo.capo.engines import native
from open_r1_capo.capo.moments import MomentTable
from open_r1_capo.capo.segments import ENGINE_VARIABLE
from oracle import random_batch

VOCAB = 60
ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(not native.available(), reason="native.c was not built: no compiler at install time")


def batch_of(dtype, seed=0, n=24, k=6, d=67):
    """A batch whose factors are exact in `dtype`, with padding, silent tokens and a bias to common ids."""
    batch, _ = random_batch(n, k, d, VOCAB, seed=seed, dtype=torch.float64)
    probs = batch.probs.float()
    ids = torch.where(torch.arange(k) < 2, torch.arange(k), batch.token_ids)  # ids 0 and 1 are everybody's
    rounded = batch.features.to(dtype)
    advantages = batch.advantages.float() * (torch.arange(n) % 5 > 0)
    return replace(batch, features=rounded, token_ids=ids, probs=probs, advantages=advantages)


def results(dtype, **settings):
    """z of a proposal and of the planned step, and the moments, after four commits with gaps between the rows."""
    step, weight = AdamStep(VOCAB, 67, **settings), torch.linspace(0, 1, 24)
    for seed in range(4):
        step.commit(batch_of(dtype, seed), weight)
    batch, state = batch_of(dtype, 9), step.state_dict()
    return step.propose(batch), step.planned(batch), state["first_moment"], state["second_moment"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absent", ["hold", "decay"])
def test_float32_is_float64_within_rounding(monkeypatch, dtype, absent):
    """The engine at hand in its working precision, against torch in float64 on the very same numbers."""
    actual = results(dtype, absent_rows=absent)
    monkeypatch.setenv(ENGINE_VARIABLE, "torch")
    monkeypatch.setattr("test_engines.batch_of", lambda _, seed, make=batch_of: as_double(make(dtype, seed)))
    for a, b in zip(actual, results(dtype, absent_rows=absent), strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).abs().max() / b.abs().max()) < 2e-6


def as_double(batch):
    parts = {name: getattr(batch, name).double() for name in ("features", "probs", "advantages")}
    return replace(batch, **parts)


def test_rows_that_decayed_to_nothing_move_nothing():
    """After 2100 steps of β₂ = 0.95 a float32 second moment is 0, and so is the decay that stands in for it."""
    batch = batch_of(torch.float32)
    step, nothing = AdamStep(VOCAB, 67, beta2=0.95, absent_rows="decay"), batch.select(slice(0, 0))
    step.commit(batch.select(slice(0, 6)), torch.ones(6))
    for _ in range(2100):
        step.commit(nothing, torch.ones(0))
    assert float(step.planned(batch).abs().max()) < 1e-6
    assert bool(step.propose(batch).isfinite().all())


@needs_native
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    before = torch.get_num_threads()
    one = results(torch.float32)
    try:
        torch.set_num_threads(threads)
        many = results(torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@needs_native
def test_blocks_that_fit_a_cache_change_nothing(monkeypatch):
    """Blocks of a few tokens and columns; the tests' other shapes fit into one."""
    whole = results(torch.float32)
    monkeypatch.setattr(native, "CACHE_BYTES", 1000)
    assert all(torch.equal(a, b) for a, b in zip(whole, results(torch.float32), strict=True))


@pytest.mark.parametrize("name", [pytest.param("torch", marks=needs_native), "triton"])
def test_every_engine_passes_the_oracle_tests(name):
    """The float64 oracles on the engines that this process does not use; Triton runs under its interpreter."""
    if name == "triton":
        pytest.importorskip("triton")
    environment = os.environ | {ENGINE_VARIABLE: name, "TRITON_INTERPRET": str(int(name == "triton"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/capo/test_steps.py"]
    command += ["tests/capo/test_last_layer.py", "tests/capo/test_moments.py", "tests/capo/test_engines.py"]
    command += [
        "-k",
        "not sgd and not every_engine and not threads and not blocks and not materialised and not scratch",
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "passed" in run.stdout


@pytest.mark.parametrize("features", ["bf16", "fp32"])
def test_kernels_compile_for_a_gpu(features, tmp_path, monkeypatch):
    """Down to machine code for a Hopper GPU, which needs none; the interpreter would accept more than the compiler."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.skip("interpreted functions are not compiled")
    from triton.backends.compiler import GPUTarget

    from open_r1_capo.capo import segment_kernels
    from open_r1_capo.capo.engines import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    integers = ("start_ptr", "stop_ptr", "order_ptr", "offsets_ptr", "token_ptr")
    types = dict.fromkeys(integers, "*i64") | {"k": "i32", "dim": "i32", "features_ptr": f"*{features}"}
    constants = {"REAL": triton.language.float32, "ENTRIES": 16, "WIDTH": 128}
    for kernel in (kernels._propose, segment_kernels._sums, kernels._commit):
        types["row_ptr"] = "*i32" if kernel is kernels._propose else "*i64"
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert len(compiled.asm["cubin"]) > 1000


def test_the_engine_follows_device_dtype_and_budget(monkeypatch):
    table, narrow = MomentTable(VOCAB, 64), torch.zeros(10, 64, dtype=torch.bfloat16)
    fast = native if native.available() else adam
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)
    assert engines.choose(table, narrow.float(), 0) is fast
    assert engines.choose(table, narrow, 10 * 64 * 4) is fast
    assert engines.choose(table, narrow, 10 * 64 * 4 - 1) is adam  # widening all features would exceed the budget
    assert engines.choose(table, narrow.double(), 10**6) is adam  # float32 moments, float64 arithmetic
    monkeypatch.setenv(ENGINE_VARIABLE, "torch")
    assert engines.choose(table, narrow.float(), 10**6) is adam
    monkeypatch.setenv(ENGINE_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="expected torch, native or triton, got 'cuda'"):
        engines.choose(table, narrow, 10**6)


def test_materialised_form_is_the_same_method():
    """What the benchmark compares with computes the same numbers."""
    ours, theirs, weight = AdamStep(VOCAB, 67), MaterialisedAdam(), (torch.arange(24) % 4 > 0).float()
    for seed in range(3):
        batch = batch_of(torch.float32, seed)
        batch = replace(batch, advantages=batch.advantages + 0.1)  # the materialised form counts silent tokens as rows
        gradients = theirs.token_gradients(batch, length=8)
        assert gradients.shape == (3, 8, 6, 67)
        expected, actual = theirs.propose(batch, gradients), ours.propose(batch)
        assert float((actual - expected).abs().max() / expected.abs().max()) < 2e-6
        ours.commit(batch, weight)
        theirs.commit(batch, weight, gradients)
    state = ours.state_dict()
    assert state["token_ids"].tolist() == sorted(theirs.first)
    second = torch.stack([theirs.second[key] for key in state["token_ids"].tolist()])
    assert float((state["second_moment"] - second).abs().max() / second.abs().max()) < 2e-6
