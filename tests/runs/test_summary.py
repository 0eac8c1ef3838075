"""The summary of a run within a KL budget, and its progress line."""

import pytest

from open_r1_capo.runs.summary import summarise
from open_r1_capo.training.callbacks import progress


def row(step, kl, nats, passes=2, back=0.0):
    budget = {"budget/kl": kl, "budget/nats": nats, "budget/alpha": 3e-4, "budget/passes": passes}
    return {"step": step, "reward": 0.5, "completions": 96 * step, "budget/taken_back": back} | budget


def test_a_budget_is_summarised():
    found = summarise({}, [row(1, 1e-3, 2e-3), row(2, 2e-3, 1.6e-3, passes=1), row(3, 0.0, 1e-3, back=1.0)])
    assert found["budget"] == {
        "kl": pytest.approx(1e-3), "largest_share": pytest.approx(1.25), "passes": pytest.approx(5 / 3),
        "taken_back": 1,
    }  # fmt: skip


def test_a_run_without_a_budget_has_none():
    assert "budget" not in summarise({}, [{"step": 1, "reward": 0.5}])


def test_the_progress_line_shows_the_kl_beside_its_budget():
    assert progress(row(7, 1e-3, 2e-3), 100, 30) == (
        "step 7/100  reward 0.500  KL 1.0e-03 of 2.0e-03  rate 3.0e-04  ETA 30 s"
    )
