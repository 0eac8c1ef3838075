"""The acceptance test of Eq. 11, its bounds one at a time."""

import math

import pytest
import torch

from open_r1_capo.capo import Mask, Scale, TokenSelection
from open_r1_capo.capo.rules import TokenRule

M_F = torch.tensor([0.0, 0.5, 1.0, 2.0, math.nan, math.inf])
M_H = torch.tensor([0.0, -3.0, 3.0, 0.1, 0.0, 0.0])


def test_mask_with_symmetric_bounds():
    selection = Mask(max_policy_shift=1.0, max_objective_shift=3.0).judge(M_F, M_H)
    assert selection.weight.tolist() == [1, 0, 0, 0, 0, 0]  # |m_H| < δ_H is strict, m_F ≤ δ_F is not
    assert selection.over_policy.tolist() == [False, False, False, True, False, False]
    assert selection.over_objective.tolist() == [False, True, True, False, False, False]
    assert selection.non_finite.tolist() == [False] * 4 + [True] * 2


def test_one_sided_bounds():
    region = Mask(math.inf, max_objective_shift=math.inf, min_objective_shift=0.0)
    assert region.judge(M_F, M_H).weight.tolist() == [1, 0, 1, 1, 0, 0]
    region = Mask(math.inf, max_objective_shift=3.0, min_objective_shift=-3.0)
    assert region.judge(M_F, M_H).weight.tolist() == [1, 1, 1, 1, 0, 0]  # both ends belong to Eq. 11's interval


def test_scale_is_the_largest_step_inside():
    selection = Scale(0.5, max_objective_shift=1.0).judge(M_F, torch.zeros(6))
    expected = [1.0, 1.0, math.sqrt(0.5), 0.5, 0.0, 0.0]
    assert selection.weight.tolist() == pytest.approx(expected)
    assert (M_F[:4] * selection.weight[:4] ** 2 <= 0.5 + 1e-6).all()
    assert Scale(0.5, 1.0).judge(M_F, M_H).weight[1] == 0  # the objective bound still rejects


def test_infinite_bounds_reject_nothing_finite():
    assert Mask(math.inf).judge(M_F, M_H).weight.tolist() == [1, 1, 1, 1, 0, 0]
    assert Scale(math.inf).judge(M_F, M_H).weight.tolist() == [1, 1, 1, 1, 0, 0]


def test_an_observer_keeps_everything():
    selection = TokenRule().select(None, None, (M_F, M_H))
    assert selection.weight.tolist() == [1] * 6
    assert selection.metrics()["policy_shift/max"] == 2.0


def test_metrics():
    region = Mask(1.0, 3.0)
    both = TokenSelection.cat([region.judge(M_F[:3], M_H[:3]), region.judge(M_F[3:], M_H[3:])])
    metrics = both.metrics()
    assert metrics["rejected_frac"] == pytest.approx(5 / 6)
    assert metrics["rejected_frac_policy"] == pytest.approx(1 / 6)
    assert metrics["rejected_frac_objective"] == pytest.approx(2 / 6)
    assert metrics["rejected_frac_non_finite"] == pytest.approx(2 / 6)
    assert metrics["policy_shift/mean"] == pytest.approx(3.5 / 4)
    assert metrics["objective_shift/max"] == 3.0
    assert both.metrics(torch.tensor([True, True, False, False, True, False]))["policy_shift/mean"] == 0.25
    assert region.judge(M_F[:0], M_H[:0]).metrics()["rejected_frac"] == 0


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_policy_shift": 0}, "max_policy_shift must be greater than 0"),
        ({"max_policy_shift": math.nan}, "max_policy_shift must be greater than 0"),
        ({"max_policy_shift": 1, "max_objective_shift": -1}, "max_objective_shift must be greater than 0"),
        ({"max_policy_shift": 1, "max_objective_shift": 1, "min_objective_shift": 1}, "must be below"),
    ],
)
def test_invalid_bounds(bounds, message):
    with pytest.raises(ValueError, match=message):
        Mask(**bounds)
