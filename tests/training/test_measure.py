"""What a step did, measured, against the full policies before and after it."""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_trainer
from open_r1_capo.capo.curvature import objective_change
from open_r1_capo.training.features import support_log_probs
from open_r1_capo.training.measure import Measured, metrics, spearman
from oracle import random_batch


def slow_spearman(a, b):
    """Pearson's correlation of the ranks, each rank counted."""
    ranks = [[sum(w < v for w in x) + (sum(w == v for w in x) + 1) / 2 for v in x] for x in (a, b)]
    means = [sum(r) / len(r) for r in ranks]
    cov = [
        [sum((x - means[i]) * (y - means[j]) for x, y in zip(ranks[i], ranks[j], strict=True)) for j in range(2)]
        for i in range(2)
    ]
    return cov[0][1] / math.sqrt(cov[0][0] * cov[1][1])


def test_rank_correlation():
    rng = random.Random(0)
    a = [rng.randint(0, 20) for _ in range(60)]  # with ties
    b = [x + rng.randint(0, 15) for x in a]
    assert spearman(torch.tensor(a), torch.tensor(b)) == pytest.approx(slow_spearman(a, b), rel=1e-12)
    rising = torch.rand(9).sort().values
    assert spearman(rising, rising**3) == pytest.approx(1)
    assert spearman(rising, -rising) == pytest.approx(-1)
    assert spearman(rising, torch.ones(9)) is None
    assert spearman(rising[:1], rising[:1]) is None
    assert spearman(rising[:0], rising[:0]) is None


def test_objective_change():
    """On a part of the vocabulary, from the full policies; to second order in a small step it is Eq. 10's m_H."""
    torch.manual_seed(0)
    old, new = (torch.randn(6, 9, dtype=torch.float64).log_softmax(1) for _ in range(2))
    batch, _ = random_batch(6, 4, vocab=9, padding=False)
    on_support = old.gather(1, batch.token_ids).exp()
    mass = on_support.sum(1)
    probs = on_support / mass[:, None]
    batch = type(batch)(batch.features, batch.token_ids, probs, batch.action_index, batch.advantages)
    sampled = batch.token_ids.gather(1, batch.action_index[:, None])
    ratio = (new.gather(1, sampled) - old.gather(1, sampled)).exp()[:, 0]
    found = objective_change(batch, mass.log(), new.gather(1, batch.token_ids))
    assert torch.allclose(found, batch.advantages * (ratio - 1), rtol=1e-9)


def test_a_step_is_measured_against_the_full_policies(build):
    """KL, the last layer's share of it, and the objective, from whole log-softmaxes before and after the step."""
    trainer = build(
        {"mode": "observe", "top_k": 1000}, max_steps=2, learning_rate=1e-3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    before, expected = [], []
    judge, after = trainer._weigh_tokens, trainer.after_step

    def policy(part, features=None):
        with torch.no_grad():
            if features is None:
                length = part.mask.shape[1]
                out = trainer.model.model(input_ids=part.input_ids, attention_mask=part.attention_mask)
                features = out.last_hidden_state[:, -length - 1 : -1][part.mask]
            return (trainer.model.lm_head(features) / 0.9).double().log_softmax(-1), features

    def judged(*args):
        part = judge(*args)
        before.append((part, *policy(part)))
        return part

    def then_compare():
        kl, head, objective, pairs = [], [], [], []
        for part, old, features in before:
            new, action = policy(part)[0], part.input_ids[:, -part.mask.shape[1] :][part.mask][:, None]
            kl.append((old.exp() * (old - new)).sum(-1))
            head.append((old.exp() * (old - policy(part, features)[0])).sum(-1))
            objective.append(part.tokens.advantages * (new.gather(1, action) - old.gather(1, action)).expm1()[:, 0])
            pairs += [
                (float(k), float(m))
                for k, m, a in zip(kl[-1], part.by_rule.policy_shift, part.tokens.advantages, strict=True)
                if a != 0
            ]
        means = [float(torch.cat(values).mean()) for values in (kl, head, objective)]
        expected.append([*means, slow_spearman(*map(list, zip(*pairs, strict=True)))])
        before.clear()
        after()

    trainer._weigh_tokens, trainer.after_step = judged, then_compare
    trainer.train()
    for row, (kl, head, objective, correlation) in zip(tiny_trainer.history(trainer), expected, strict=True):
        assert row["capo/measured_kl"] == pytest.approx(kl, rel=1e-3)
        assert row["capo/measured_kl_head"] == pytest.approx(head, rel=1e-3)
        assert row["capo/measured_objective"] == pytest.approx(objective, rel=1e-3)
        assert row["capo/kl_spearman"] == pytest.approx(correlation, abs=0.02)  # near ties change places
        assert kl > 1e-5
        assert 0 < head != kl


def test_bfloat16_weights_give_float32_log_probabilities(tiny_policy):
    """Logits of bfloat16 factors are products in float32; rounded to bfloat16 they are off by 2⁻⁹ of their size."""
    narrow = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.bfloat16)
    weight = narrow.get_output_embeddings().weight.detach()
    hidden = torch.randn(20, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(weight.shape[0]).expand(20, -1)
    exact = (hidden.double() @ weight.double().T / 0.9).log_softmax(1)
    found = support_log_probs(narrow, hidden, ids, 0.9)
    assert float((found - exact).abs().max()) < 1e-5 * float(exact.abs().max())


def test_a_measurement_that_failed_is_not_a_kl_of_0(build):
    trainer = build({"mode": "observe"}, max_steps=1)
    found = []
    after = trainer.after_step
    trainer.after_step = lambda: (found.append(list(trainer.update.micro_batches)), after())
    trainer.train()
    (part,) = found[0]
    n = len(part.tokens)
    broken = torch.full((n,), math.nan, dtype=torch.float64)
    half = torch.where(torch.arange(n) % 2 == 0, torch.ones_like(broken), broken)
    everyone = torch.ones(n, dtype=torch.bool)

    def logged(kl):
        return metrics(trainer.accelerator, [part], [Measured(everyone, kl, kl, kl, kl.float())])

    assert math.isnan(logged(broken)["measured_kl"])
    assert logged(broken)["measured_non_finite"] == 1
    assert (logged(half)["measured_kl"], logged(half)["measured_non_finite"]) == (1, pytest.approx(n // 2 / n))
    assert tiny_trainer.history(trainer)[0]["capo/measured_non_finite"] == 0


def test_no_gradient_no_correlation(build):
    trainer = build({"mode": "observe"}, max_steps=1, reward=lambda completion_ids, **kw: [1.0] * len(completion_ids))
    trainer.train()
    (row,) = tiny_trainer.history(trainer)
    assert "capo/kl_spearman" not in row
    assert row["capo/measured_objective"] == 0
