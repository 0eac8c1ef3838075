"""The KL budget of a step, and the measured divergence it is calibrated with."""

import math

import pytest
import torch

from open_r1_capo.budget.rules import LengthDecay, StepRule
from open_r1_capo.capo.curvature import support_kl
from oracle import random_batch


def test_the_step_spends_at_most_its_budget():
    budget = StepRule(1e-3, step_feedback=False)
    assert budget.factor(5e-4) == 1.0
    assert 4e-3 * budget.factor(4e-3) ** 2 == pytest.approx(1e-3)
    assert StepRule(math.inf).factor(1e9) == 1.0


def test_calibration_is_a_running_log_average():
    budget = StepRule(1e-3)
    budget.observe(measured_kl=8e-3, predicted_kl=1e-3)
    assert budget.calibration == pytest.approx(8**0.3)
    assert budget.factor(4e-3) == pytest.approx(math.sqrt(1e-3 / (4e-3 * 8**0.3)))
    for _ in range(200):
        budget.observe(measured_kl=10.0, predicted_kl=2e-6)
    assert budget.calibration == pytest.approx(1e3)
    for nothing in ((1e-3, 0.0), (math.nan, 1e-3), (math.inf, 1e-3), (1e-3, 2e-19), (0.0, 1e-19)):
        budget.observe(*nothing)
    assert budget.calibration == pytest.approx(1e3)


def test_support_kl():
    """Exact on the whole vocabulary; on a part of it, the divergence of the merged distributions."""
    torch.manual_seed(0)
    old, new = (torch.randn(6, 9, dtype=torch.float64).log_softmax(1) for _ in range(2))
    batch, _ = random_batch(6, 9, vocab=9, padding=False)
    ids = torch.arange(9).expand(6, -1)
    whole = type(batch)(batch.features, ids, old.exp(), batch.action_index, batch.advantages)
    exact = (old.exp() * (old - new)).sum(1)
    assert torch.allclose(support_kl(whole, torch.zeros(6), new), exact, rtol=1e-9)
    kept = old[:, :4].exp()
    mass = kept.sum(1)
    part = type(batch)(batch.features, ids[:, :4], kept / mass[:, None], batch.action_index % 4, batch.advantages)
    rest_old, rest_new = 1 - mass, 1 - new[:, :4].exp().sum(1)
    merged = (kept * (old - new)[:, :4]).sum(1) + rest_old * (rest_old / rest_new).log()
    found = support_kl(part, mass.log(), new[:, :4])
    assert torch.allclose(found, merged, rtol=1e-9)
    assert (found <= exact).all()


def test_support_kl_of_an_unmoved_policy_is_zero():
    batch, _ = random_batch(6, 5, dtype=torch.float32)
    new = batch.probs.log() + math.log(0.7)
    assert support_kl(batch, torch.full((6,), math.log(0.7)), new).max() < 1e-6


def test_longer_completions_halve_the_rate_for_good():
    """The usual length is a running mean; a step above `length_ratio` of it halves the rate, once."""
    rule = LengthDecay(length_ratio=1.2)
    for length in (20.0, 22.0, 21.0):
        rule.foresee(length)
    assert rule.factor(predicted_kl=1.0) == 1.0
    assert rule.usual_length == pytest.approx(0.9 * (0.9 * 20 + 0.1 * 22) + 0.1 * 21)
    rule.foresee(30.0)
    assert rule.factor(1.0) == 0.5 and rule.usual_length == 30.0
    for _ in range(5):
        rule.foresee(31.0)
    assert rule.factor(1.0) == 0.5
    rule.foresee(10.0)
    rule.foresee(40.0)
    assert rule.factor(1.0) == 0.25


def test_a_length_ratio_of_one_is_refused():
    with pytest.raises(ValueError, match="length_ratio must be greater than 1, got 1"):
        LengthDecay(length_ratio=1.0)
