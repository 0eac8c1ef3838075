"""The table of moments: growth, restoring, and input that cannot be."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from benchmarks.common import Shape

from open_r1_capo.capo import AdamStep, SGDStep, TokenBatch, policy_shift
from open_r1_capo.capo.moments import MomentTable
from oracle import random_batch

ROOT = Path(__file__).parents[2]


def test_table_grows_geometrically_and_keeps_rows():
    table, seen, sizes = MomentTable(1000, 3), [], set()
    for start in range(0, 1000, 50):
        ids = torch.arange(start, start + 50)
        row = table.grow(ids)
        table.first[row] = ids[:, None].float()
        seen.append(ids)
        sizes.add(len(table.first))
    everything = torch.cat(seen)
    assert torch.equal(table.first[table.row_of[everything].long()][:, 0], everything.float())
    assert len(table.first) == 1001  # never beyond the vocabulary and the zero row
    assert len(sizes) <= 7
    assert float(table.first[0].abs().sum()) == 0
    assert torch.equal(table.grow(everything), table.row_of[everything].long())  # nothing grows twice


def committed(dtype=torch.float32):
    step = AdamStep(11, 7)
    step.commit(random_batch(dtype=dtype)[0], torch.ones(12))
    return step


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("first_moment", lambda x: x[:, 1:], r"first_moment: expected shape \(\d+, 7\), got \(\d+, 6\)"),
        ("second_moment", lambda x: x * torch.inf, "second_moment: expected finite values, got"),
        ("second_moment", lambda x: -x, "second_moment: expected values ≥ 0, got a minimum of -"),
        ("last_step", lambda x: x[1:], r"last_step: expected shape"),
        ("token_ids", lambda x: x + 5, r"token_ids: expected values in 0..10, got 5..15"),
        ("token_ids", lambda x: x * 0, r"token_ids: expected \d+ distinct ids, got 1"),
        ("token_ids", lambda x: x.float(), "token_ids: expected integers"),
    ],
)
def test_moments_that_cannot_be_are_refused(name, change, message):
    state = committed().state_dict()
    fresh = AdamStep(11, 7)
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(state | {name: change(state[name])})
    assert fresh.step_count == 0
    assert fresh.table.rows == 1  # nothing of it was taken


def test_an_incomplete_state_is_refused():
    state = committed().state_dict()
    del state["second_moment"], state["step_count"]
    with pytest.raises(ValueError, match="lacks step_count, second_moment"):
        AdamStep(11, 7).load_state_dict(state)


@pytest.mark.parametrize("make", [SGDStep, lambda: AdamStep(11, 7)])
def test_batches_that_do_not_fit_are_refused(make):
    batch, _ = random_batch(dtype=torch.float32)
    negative = replace(batch, token_ids=batch.token_ids - 5)
    half = replace(batch, probs=batch.probs / 2)
    step = make()
    for call in (step.propose, lambda b: step.accumulate(b, torch.ones(12)), lambda b: step.commit(b, torch.ones(12))):
        with pytest.raises(ValueError, match="token_ids: expected values"):
            call(negative)
        with pytest.raises(ValueError, match="probs: expected rows that sum to 1"):
            call(half)
    with pytest.raises(ValueError, match=r"weight: expected shape \(12,\), got \(11,\)"):
        step.accumulate(batch, torch.ones(11))
    with pytest.raises(ValueError, match=r"weight: expected shape \(12,\), got None"):
        step.commit(batch)
    assert step.step_count == 0


def test_ids_outside_the_vocabulary_are_refused():
    batch, _ = random_batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"token_ids: expected values in 0..8, got 0..10"):
        AdamStep(9, 7).propose(batch)


@pytest.mark.parametrize("make", [SGDStep, lambda: AdamStep(11, 7)])
def test_no_tokens_are_no_work(make):
    empty = TokenBatch(
        torch.zeros(0, 7),
        torch.zeros(0, 3, dtype=torch.int64),
        torch.zeros(0, 3),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
    )
    step = make()
    step.commit(random_batch(dtype=torch.float32)[0], torch.ones(12))
    for granularity in ("token", "batch"):
        assert policy_shift(empty, step.propose(empty, granularity), 1.0, granularity).shape == (0,)
    step.accumulate(empty, torch.zeros(0))
    step.commit()
    step.commit(empty, torch.zeros(0))
    assert step.planned(empty).shape == (0, 3)
    assert step.step_count == 3


@pytest.mark.parametrize("engine", ["ours", "ours (torch)"])
def test_scratch_stays_far_below_the_token_gradients(engine):
    """One (N, T, K, D) tensor would be 92 MB."""
    shape = json.dumps(asdict(Shape(tokens=512, rows=1000, vocab=1000)))
    command = [sys.executable, "benchmarks/contenders.py", engine, shape]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["extra_mb"] < 20
