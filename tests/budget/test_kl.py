"""The estimate of a step's KL from log-probabilities: against the exact divergence of categorical policies."""

import math

import pytest
import torch

from open_r1_capo.budget.kl import sampled_kl


@pytest.mark.parametrize("size", [1e-2, 1e-1, 1.0])
def test_the_mean_is_the_divergence(size):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0)
    new = (old + size * torch.randn(9, generator=generator, dtype=torch.float64)).log_softmax(0)
    exact = float((old.exp() * (old - new)).sum())
    tokens = torch.multinomial(old.exp(), 200_000, replacement=True, generator=generator)
    found = sampled_kl(old[tokens], new[tokens])
    assert abs(found.mean - exact) < 4 * found.error
    assert found.error < 0.03 * exact
    assert found.count == 200_000


def test_a_small_step_survives_float32():
    """Two policies that differ by a thousandth of a nat: half the square, with float32 log-probabilities near -8."""
    old = torch.full((1000,), -8.0)
    step = torch.where(torch.arange(1000) % 2 == 0, 1.0, -1.0) * 1e-3
    assert sampled_kl(old, old + step).mean == pytest.approx(0.5e-6, rel=1e-2)
    assert sampled_kl(old, old).mean == 0.0


def test_only_the_masked_tokens_count():
    old, new = torch.zeros(2, 3), torch.tensor([[0.1, 5.0, 5.0], [-0.1, 0.1, 5.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]])
    expected = [math.expm1(x) - x for x in (0.1, -0.1, 0.1)]
    assert sampled_kl(old, new, mask).mean == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert math.isnan(sampled_kl(old, new, mask * 0).mean)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"new_log_probs: expected shape \(2, 3\), got \(3, 2\)"):
        sampled_kl(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\), got \(2,\)"):
        sampled_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))
