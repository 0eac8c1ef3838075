"""TokenBatch: shapes, values, and the gradient rows of Eq. 7."""

from dataclasses import replace

import pytest
import torch

from open_r1_capo.capo import TokenBatch
from open_r1_capo.capo.last_layer import merge, row_gradient
from oracle import random_batch, token_gradient


def test_gradient_rows_equal_autograd():
    batch, weight = random_batch()
    dense = sum(token_gradient(weight, batch, i) for i in range(len(batch)))
    rows = row_gradient(batch, torch.ones(12), 10**6)
    assert torch.allclose(rows.total, dense[rows.token_ids], rtol=1e-11)
    assert dense.abs().sum() == pytest.approx(rows.total.abs().sum().item())


def test_rejected_tokens_leave_no_trace():
    batch, _ = random_batch()
    keep = (torch.arange(12) % 3 > 0).double()
    features = batch.features.clone()
    features[keep == 0] = torch.nan
    expected = row_gradient(batch.select(keep > 0), torch.ones(8), 10**6)
    actual = row_gradient(replace(batch, features=features), keep, 10**6)
    assert all(torch.equal(a, b) for a, b in zip(vars(actual).values(), vars(expected).values(), strict=True))


def test_merge_is_the_sum():
    batch, _ = random_batch(n=20)
    whole = row_gradient(batch, torch.ones(20), 10**6)
    parts = [row_gradient(batch.select(s), torch.ones(len(range(20)[s])), 10**6) for s in (slice(0, 7), slice(7, 20))]
    for name, value in vars(merge(parts)).items():
        assert torch.allclose(value.double(), getattr(whole, name).double()), name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", torch.zeros(12), r"features: expected a floating \(N, D\), got torch.float32 \(12,\)"),
        ("token_ids", torch.zeros(12, 5), "token_ids: expected an int64"),
        ("probs", torch.zeros(12, 4), r"probs: expected shape \(12, 5\), got \(12, 4\)"),
        ("advantages", torch.zeros(11), r"advantages: expected shape \(12,\), got \(11,\)"),
        ("groups", torch.zeros(3), r"groups: expected shape \(12,\), got \(3,\)"),
    ],
)
def test_shapes_are_checked(name, value, message):
    with pytest.raises(ValueError, match=message):
        replace(random_batch()[0], **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_ids", torch.full((12, 5), 11), r"token_ids: expected values in 0..10, got 11..11"),
        ("action_index", torch.full((12,), 5), r"action_index: expected values in 0..4, got 5..5"),
        ("probs", torch.full((12, 5), 0.1, dtype=torch.float64), r"probs: expected rows that sum to 1.* 0.5 in row 0"),
    ],
)
def test_values_are_checked(name, value, message):
    batch, _ = random_batch()
    batch.validate(11)
    with pytest.raises(ValueError, match=message):
        replace(batch, **{name: value}).validate(11)


def test_subsets_need_groups():
    batch = replace(random_batch()[0], groups=None)
    assert batch.subsets("batch").unique().tolist() == [0]
    with pytest.raises(ValueError, match="needs the subset of each token"):
        batch.subsets("sequence")
    with pytest.raises(ValueError, match="expected one of token, sequence, group, batch"):
        batch.subsets("sentence")


def test_padding_is_not_support():
    batch = TokenBatch(
        features=torch.ones(1, 2),
        token_ids=torch.tensor([[4, 2, 4]]),
        probs=torch.tensor([[0.7, 0.3, 0.0]]),
        action_index=torch.tensor([0]),
        advantages=torch.ones(1),
    )
    assert batch.occupied.tolist() == [[True, True, False]]
    assert torch.allclose(batch.score, torch.tensor([[0.3, -0.3, 0.0]]))
    assert row_gradient(batch, torch.ones(1), 10**6).count.tolist() == [1, 1]
