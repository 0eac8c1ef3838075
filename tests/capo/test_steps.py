"""The optimizer models against dense float64 oracles and torch.optim."""

import itertools
from dataclasses import replace

import pytest
import torch

from open_r1_capo.capo import AdamStep, SGDStep, objective_shift, policy_shift
from open_r1_capo.capo.curvature import VocabularySums, predicted_kl, sgd_shifts, subset_mean
from open_r1_capo.capo.last_layer import TokenBatch, merge, row_gradient
from oracle import adam_direction, mean_gradient, random_batch, shifts

LR = 0.03
ERROR = 1e-10
SHAPES = [(12, 5, 7, 11), (9, 2, 3, 6), (1, 4, 5, 4), (16, 8, 2, 8)]


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def dense_moments(step):
    """An AdamStep's rows as dense float64 (V, D) moments."""
    state = step.state_dict()
    first = torch.zeros(step.vocab_size, step.dim, dtype=torch.float64)
    second = first.clone()
    first[state["token_ids"]], second[state["token_ids"]] = (
        state["first_moment"].double(),
        state["second_moment"].double(),
    )
    return first, second


def members_of(batch, granularity):
    subset = batch.subsets(granularity)
    return [[i for i in range(len(batch)) if subset[i] == b] for b in subset.unique()]


@pytest.mark.parametrize("granularity", ["token", "sequence", "group", "batch"])
@pytest.mark.parametrize("optimizer", ["sgd", "per_logit", "per_token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shifts_equal_the_dense_oracle(granularity, optimizer, shape):
    n, k, d, vocab = shape
    batch, weight = random_batch(n, k, d, vocab, seed=n)
    step = SGDStep() if optimizer == "sgd" else AdamStep(vocab, d, moment_average=optimizer)
    if optimizer != "sgd":  # moments with a history
        for seed in range(3):
            step.commit(random_batch(n, k, d, vocab, seed=50 + seed)[0], torch.ones(n, dtype=torch.float64))
    z = step.propose(batch, granularity)
    m_f, m_h = policy_shift(batch, z, LR, granularity), objective_shift(batch, z, LR, granularity)
    kl = subset_mean(batch, predicted_kl(batch, z, LR), granularity)
    average = "per_token" if optimizer == "sgd" else optimizer
    for members in members_of(batch, granularity):
        direction = mean_gradient(weight, batch, members, torch.ones(n), average)
        if optimizer != "sgd":
            direction = adam_direction(*dense_moments(step), direction, step.step_count + 1)
        expected = shifts(weight, batch, members, direction, LR)
        for actual, oracle in zip((m_f, m_h, kl), expected, strict=True):
            assert relative_error(actual[members], oracle.expand(len(members))) < ERROR


@pytest.mark.parametrize(("average", "absent"), itertools.product(["per_logit", "per_token"], ["hold", "decay"]))
def test_twenty_steps_equal_torch_optim(average, absent):
    """Same gradients, same moments and same movement as torch's dense Adam (decay) or SparseAdam (hold)."""
    vocab, d, lr = 13, 6, 0.01
    step = AdamStep(vocab, d, moment_average=average, absent_rows=absent)
    parameter = torch.nn.Parameter(random_batch(d=d, vocab=vocab)[1].clone())
    make = torch.optim.SparseAdam if absent == "hold" else torch.optim.Adam
    optimizer = make([parameter], lr=lr)
    for seed in range(20):
        batch, weight = random_batch(6, 3, d, vocab, seed=seed)
        keep = (torch.arange(6) % 4 != 1).double() * torch.linspace(0.2, 1, 6, dtype=torch.float64)
        gradient = -mean_gradient(weight, batch, range(6), keep, average)  # torch.optim descends
        touched = gradient.abs().sum(1).nonzero()[:, 0]
        sparse = torch.sparse_coo_tensor(touched[None], gradient[touched], gradient.shape, check_invariants=True)
        parameter.grad = sparse.coalesce() if absent == "hold" else gradient
        before = parameter.detach().clone()
        if absent == "hold":  # SparseAdam adds ε to √Q, Adam (and ours) to √Q̂
            optimizer.param_groups[0]["eps"] = 1e-8 * (1 - 0.999 ** (seed + 1)) ** 0.5
        optimizer.step()
        step.commit(batch, keep)
        moved = (parameter.detach() - before) / lr
        expected = torch.einsum("nkd,nd->nk", moved[batch.token_ids], batch.features)
        assert relative_error(step.planned(batch), expected) < ERROR
    state = optimizer.state[parameter]
    if absent == "hold":
        first, second = dense_moments(step)
        assert relative_error(first, -state["exp_avg"]) < ERROR
        assert relative_error(second, state["exp_avg_sq"]) < ERROR


def test_propose_reads_only():
    batch, _ = random_batch()
    step = AdamStep(11, 7)
    step.commit(batch, torch.ones(12))
    before = step.state_dict()
    for granularity in ("token", "sequence", "batch"):
        step.propose(batch, granularity)
    step.planned(batch)
    after = step.state_dict()
    assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(after[k])) for k in before if k != "settings")


@pytest.mark.parametrize("average", ["per_logit", "per_token"])
def test_whole_batch_proposal_is_the_planned_step(average):
    """Proposing the batch as one subset predicts exactly the step that committing it takes."""
    batch, _ = random_batch(n=20)
    step = AdamStep(11, 7, moment_average=average)
    step.commit(random_batch(n=20, seed=3)[0], torch.ones(20))
    proposed = step.propose(batch, "batch")
    step.commit(batch, torch.ones(20))
    assert relative_error(proposed * batch.occupied, step.planned(batch) * batch.occupied) < ERROR


@pytest.mark.parametrize("make", [SGDStep, lambda: AdamStep(11, 7)])
def test_micro_batches_and_ranks_add_up(make):
    """Accumulating parts, in any order, or reducing two ranks' gradients, equals one commit."""
    batch, _ = random_batch(n=15)
    weight = torch.linspace(0, 1, 15, dtype=torch.float64)
    whole, parts, ranks = make(), make(), make()
    whole.commit(batch, weight)
    for part in (slice(9, 15), slice(0, 4), slice(4, 9)):
        parts.accumulate(batch.select(part), weight[part])
    parts.commit()
    other = row_gradient(batch.select(slice(6, 15)), weight[6:], 10**6)
    ranks.commit(batch.select(slice(0, 6)), weight[:6], reduce=lambda mine: merge([mine, other]))
    for step in (parts, ranks):
        assert relative_error(step.planned(batch), whole.planned(batch)) < ERROR


@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
def test_scratch_bound_changes_nothing(granularity):
    batch, _ = random_batch(n=30, k=6)
    small, large = AdamStep(11, 7, scratch_bytes=1), AdamStep(11, 7)
    for step in (small, large):
        step.commit(random_batch(n=30, k=6, seed=1)[0], torch.ones(30))
    assert torch.allclose(small.propose(batch, granularity), large.propose(batch, granularity), rtol=1e-12)
    assert torch.allclose(small.planned(batch), large.planned(batch), rtol=1e-12)


def test_tokens_without_advantage_need_no_work_but_count():
    batch, _ = random_batch()
    silent = TokenBatch(batch.features, batch.token_ids, batch.probs, batch.action_index, batch.advantages * 0)
    step = AdamStep(11, 7, moment_average="per_token")
    assert torch.equal(step.propose(silent), torch.zeros(12, 5, dtype=torch.float64))
    step.accumulate(silent, torch.ones(12))
    step.accumulate(batch, torch.ones(12))
    step.commit()
    alone = AdamStep(11, 7, moment_average="per_token")
    alone.commit(batch, torch.ones(12))
    assert torch.allclose(step.table.first[1:], alone.table.first[1:] / 2)


@pytest.mark.parametrize("average", ["per_logit", "per_token"])
@pytest.mark.parametrize("granularity", ["sequence", "batch"])
def test_silent_tokens_in_any_micro_batch(average, granularity):
    """Whichever micro-batch the tokens without an advantage are in, the step is the same, and is the one proposed."""
    batch, _ = random_batch(n=20)
    batch = replace(batch, advantages=batch.advantages * (torch.arange(20) % 3 > 0))
    whole, parts = (AdamStep(11, 7, moment_average=average) for _ in range(2))
    proposed = whole.propose(batch, granularity)
    whole.commit(batch, torch.ones(20))
    for index in (torch.arange(20) % 3 == 0, torch.arange(20) % 3 == 1, torch.arange(20) % 3 == 2):
        parts.accumulate(batch.select(index), torch.ones(int(index.sum())))
    parts.commit()
    assert relative_error(parts.planned(batch), whole.planned(batch)) < ERROR
    if granularity == "batch":
        assert relative_error(proposed * batch.occupied, whole.planned(batch) * batch.occupied) < ERROR


def test_a_step_of_rejected_tokens_only_counts_and_touches_nothing():
    batch, _ = random_batch()
    step = AdamStep(11, 7)
    step.commit(batch, torch.ones(12))
    before = step.state_dict()
    broken = TokenBatch(batch.features * torch.nan, batch.token_ids, batch.probs, batch.action_index, batch.advantages)
    step.commit(broken, torch.zeros(12))
    after = step.state_dict()
    assert after["step_count"] == before["step_count"] + 1
    assert torch.equal(after["first_moment"], before["first_moment"])
    assert torch.equal(step.planned(batch), torch.zeros(12, 5, dtype=torch.float64))


def test_non_finite_tokens_stay_alone():
    batch, _ = random_batch()
    features = batch.features.clone()
    features[3], features[7] = torch.nan, torch.inf
    broken = TokenBatch(features, batch.token_ids, batch.probs, batch.action_index, batch.advantages)
    step = AdamStep(11, 7)
    m_f = policy_shift(broken, step.propose(broken), LR)
    assert m_f.isfinite().tolist() == [i not in (3, 7) for i in range(12)]


@pytest.mark.parametrize("absent", ["hold", "decay"])
def test_state_continues_exactly(absent):
    step, copy = AdamStep(11, 7, absent_rows=absent), AdamStep(11, 7, absent_rows=absent)
    for seed in range(3):
        step.commit(random_batch(4, 3, seed=seed)[0], torch.ones(4))
    copy.load_state_dict(step.state_dict())
    for seed in range(3, 6):
        batch, _ = random_batch(4, 3, seed=seed)
        assert torch.equal(step.propose(batch), copy.propose(batch))
        step.commit(batch, torch.ones(4))
        copy.commit(batch, torch.ones(4))
        assert torch.equal(step.planned(batch), copy.planned(batch))


def test_foreign_state_is_refused():
    state = AdamStep(11, 7).state_dict()
    with pytest.raises(ValueError, match=r"vocab_size=11 \(expected 12\).*beta2=0.999 \(expected 0.9\)"):
        AdamStep(12, 7, beta2=0.9).load_state_dict(state)
    step = AdamStep(11, 7)
    step.commit(random_batch()[0], torch.ones(12))
    state = step.state_dict()
    state["second_moment"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="second_moment: expected finite values, got 1"):
        AdamStep(11, 7).load_state_dict(state)


def test_wrong_use_names_what_is_wrong():
    batch, _ = random_batch()
    with pytest.raises(ValueError, match="expected width 8, got 7"):
        AdamStep(11, 8).propose(batch)
    with pytest.raises(ValueError, match="nothing was accumulated"):
        SGDStep().commit()
    with pytest.raises(ValueError, match="moment_average"):
        AdamStep(11, 7, moment_average="mean")


def closed_form_and_exact(logits, actions, dtype):
    """m_F and m_H by the closed form on logits of a dtype, and by the oracle's formulas in float64."""
    n = len(logits)
    features, advantages = torch.full((n, 2), 0.5, dtype=dtype), torch.linspace(-1, 1, n, dtype=dtype)
    batch = TokenBatch(features, torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1, dtype=dtype),
                       torch.zeros(n, dtype=torch.int64), advantages)  # fmt: skip
    found = sgd_shifts(batch, VocabularySums.of(logits.to(dtype).softmax(1), actions), LR)
    p = logits.double().softmax(1)
    others = p.scatter(1, actions[:, None], 0)
    v = torch.where(others == 0, others.sum(1, keepdim=True), -others)  # e_a - π, its action as the sum of the others
    stretch = advantages.double() * 0.5
    slope, mean = stretch * v.square().sum(1), (p * v).sum(1, keepdim=True)
    variance = stretch.square() * (p * (v - mean).square()).sum(1)
    hessian = advantages.double() * (slope.square() - variance)
    return found, (0.5 * LR**2 * slope.square(), LR * advantages.double() * slope + 0.5 * LR**2 * hessian)


def test_sgd_closed_form_of_nearly_certain_tokens_in_float32():
    """1 - π from 1e-7 to 0.5: nothing of the closed form cancels."""
    rest = torch.logspace(-7, -0.31, 60, dtype=torch.float64)
    logits = torch.randn(60, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 3] = logits[:, 4:].logsumexp(1) + (1 / rest).sub(1).log()
    logits[:, :3] = -40.0
    found, exact = closed_form_and_exact(logits, torch.full((60,), 3), torch.float32)
    for ours, true in zip(found, exact, strict=True):
        assert ((ours.double() - true).abs() / true.abs()).max() < 1e-4


def test_sgd_closed_form_over_the_full_vocabulary():
    n, d, vocab = 10, 4, 9
    batch, _ = random_batch(n, vocab, d, vocab, padding=False)
    z = SGDStep().propose(batch)
    m_f, m_h = sgd_shifts(batch, VocabularySums.of(batch.probs.clone(), batch.action_index), LR)
    assert relative_error(m_f, policy_shift(batch, z, LR)) < ERROR
    assert relative_error(m_h, objective_shift(batch, z, LR)) < ERROR
