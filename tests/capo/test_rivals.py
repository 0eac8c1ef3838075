"""Rival rules as token weights: their formulas, and that the trainer applies them."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import oracle
import tiny_trainer
from open_r1_capo.budget.rules import AdaptedRate, NormGuard
from open_r1_capo.capo import rules
from open_r1_capo.settings.capo import ConfigError, capo_config
from open_r1_capo.training.update import step_generator as draw


def test_log_probability_of_the_full_policy():
    """A support of four ids out of nine: its renormalised probability times its mass is the policy's own."""
    torch.manual_seed(0)
    batch, _ = oracle.random_batch(6, 4, vocab=9, padding=False)
    full = torch.randn(6, 9, dtype=torch.float64).softmax(1)
    on_support = full.gather(1, batch.token_ids)
    mass = on_support.sum(1)
    batch = type(batch)(
        batch.features, batch.token_ids, on_support / mass[:, None], batch.action_index, batch.advantages
    )
    sampled = batch.token_ids.gather(1, batch.action_index[:, None])
    assert torch.allclose(batch.action_log_prob(mass.log()), full.gather(1, sampled)[:, 0].log(), rtol=1e-12)


def test_probability_weight():
    prob = torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64)
    tokens = SimpleNamespace(action_log_prob=lambda log_mass: prob.log())
    expected = [0.3 * p + 0.7 for p in prob.tolist()]
    assert rules.Probability(0.3).weight(tokens, None, None).tolist() == pytest.approx(expected, rel=1e-12)
    assert rules.Probability(0.0).weight(tokens, None, None).tolist() == [1.0] * 3


def test_improbable_leaves_out_as_many_tokens_as_the_mask():
    """Of the tokens with a gradient those of least π(a) under the full policy, by sorting Python numbers."""
    batch, _ = oracle.random_batch(60, 4, vocab=9, seed=3)
    batch = replace(batch, advantages=batch.advantages.masked_fill(torch.arange(60) % 5 == 0, 0))
    log_mass = -torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifts = [torch.rand(60, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (2, 3)]
    shifts = [shift.where(batch.advantages != 0, 0) for shift in shifts]
    shifts[0][[1, 7]] = math.nan
    bounds = {"max_policy_shift": 0.7, "max_objective_shift": 0.9}
    mask = rules.Mask(**bounds).judge(*shifts)
    found = rules.Improbable(**bounds).select(batch, log_mass, shifts)
    prob = {
        i: float(batch.probs[i, batch.action_index[i]]) * math.exp(float(log_mass[i]))
        for i in range(60)
        if batch.advantages[i] != 0 and i not in (1, 7)
    }
    count = sum(1 for i in prob if shifts[0][i] > 0.7 or shifts[1][i] >= 0.9)
    least = sorted(prob, key=prob.get)[:count]
    assert 10 < count < len(prob)
    assert set((found.weight == 0).nonzero()[:, 0].tolist()) == {1, 7, *least}
    assert set(found.other.nonzero()[:, 0].tolist()) == set(least)
    assert found.weight.sum() == mask.weight.sum()
    assert not torch.equal(found.weight, mask.weight)


def test_covariance_sums_to_the_covariance():
    torch.manual_seed(0)
    log_prob, advantages = -torch.rand(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    found = rules.covariance(log_prob, advantages)
    assert found.mean() == pytest.approx(float(torch.cov(torch.stack([log_prob, advantages]), correction=0)[0, 1]))
    mean_a, mean_p = sum(advantages.tolist()) / 50, sum(log_prob.tolist()) / 50
    assert float(found[7]) == pytest.approx((float(advantages[7]) - mean_a) * (float(log_prob[7]) - mean_p))


def test_covariance_weight_leaves_random_candidates_out():
    cov = torch.linspace(-2, 8, 1001, dtype=torch.float64)
    weight = rules.Covariance(0.05, 1.0, 5.0).leave_out(cov, draw(0, 3))
    out = cov[weight == 0]
    assert len(out) == 50
    assert out.min() > 1
    assert out.max() < 5
    assert torch.equal(weight, rules.Covariance(0.05, 1.0, 5.0).leave_out(cov, draw(0, 3)))
    assert not torch.equal(weight, rules.Covariance(0.05, 1.0, 5.0).leave_out(cov, draw(0, 4)))
    assert (rules.Covariance(1e-9, 1.0, 5.0).leave_out(cov) == 0).sum() == 1  # at least one, as the authors' code
    assert (rules.Covariance(1.0, 1.0, 5.0).leave_out(cov) == 0).sum() == 399
    assert (rules.Covariance(0.5, 9.0, 10.0).leave_out(cov) == 0).sum() == 0
    assert (rules.Covariance(0.0, 1.0, 5.0).leave_out(cov) == 0).sum() == 0


def test_norm_of_a_tokens_gradient():
    """Against autograd on an explicit W; the clipped gradient is at most as long as the bound."""
    batch, weight = oracle.random_batch()
    norm = batch.gradient_norm()
    clip = rules.GradientNorm(0.8).weight(batch, None, None)
    for i in range(len(batch)):
        gradient = oracle.token_gradient(weight, batch, i)
        assert float(norm[i]) == pytest.approx(float(gradient.norm()), rel=1e-9)
        assert float((clip[i] * gradient).norm()) == pytest.approx(min(0.8, float(gradient.norm())), rel=1e-9)
    assert 0 < (clip < 1).sum() < len(batch)
    assert (rules.GradientNorm().weight(batch, None, None) == 1).all()
    still = SimpleNamespace(gradient_norm=lambda: torch.zeros(1))
    assert rules.GradientNorm(0.8).weight(still, None, None).item() == 1


def test_the_rate_follows_the_measured_kl():
    rate = AdaptedRate(1e-3)
    found = []
    for kl in (5e-3, 3e-3, 1.9e-3, 6e-4, 4e-4, 4e-4, 4e-4, math.nan):
        rate.observe(kl, predicted_kl=0.0)
        found.append(rate.factor(123.0))
    s = 1 / 1.5
    assert found == pytest.approx([s, s**2, s**2, s**2, s, 1, 1, s])


def test_an_unusual_gradient_is_skipped():
    guard = NormGuard(2.0)
    assert not any(guard.skips(norm) for norm in (1.0, 9.0, 1.0, 0.0, 1.0, 1.2))  # warming up; 0 is no gradient
    assert not guard.skips(2.0)
    assert guard.skips(2.5)
    assert guard.norms == [1.0, 9.0, 1.0, 1.0, 1.2, 2.0, 2.5]
    grown = [guard.skips(50.0) for _ in range(12)]
    assert grown == [True] * 7 + [False] * 5  # a norm that stays large is usual in the end
    assert not NormGuard().skips(1e30)
    assert len([guard.skips(1.0) for _ in range(99)]) == 99
    assert len(guard.norms) == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "probability", "probability_alpha": 1.5}, "probability_alpha is a share between 0 and 1"),
        ({"mode": "covariance", "covariance_frac": -1}, "covariance_frac is a share between 0 and 1"),
        ({"mode": "covariance", "covariance_low": 5.0}, "covariance_low must be below"),
        ({"mode": "gradient_norm", "max_token_gradient": 0}, "max_token_gradient must be greater than 0"),
        ({"skip_gradient_norm": 1.0}, "skip_gradient_norm must be greater than 1"),
        ({"step_rule": "adapt"}, "step_rule=adapt needs a KL to aim at"),
        ({"step_rule": "adapt", "step_policy_shift": 1e-3, "measure_kl": 0}, "step_rule=adapt needs the measured KL"),
        ({"step_rule": "plane"}, "step_rule must be one of plan, adapt"),
    ],
)
def test_bad_settings_are_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        capo_config(**settings)


NEUTRAL = {
    "probability": {"probability_alpha": 0.0},
    "covariance": {"covariance_frac": 0.0},
    "gradient_norm": {"max_token_gradient": math.inf},
    "improbable": {"max_policy_shift": math.inf},
    "observe": {"skip_gradient_norm": 1e9, "step_rule": "adapt", "step_policy_shift": 1e9},
}


@pytest.mark.parametrize("mode", NEUTRAL)
def test_a_rival_that_changes_nothing_is_trl(build, mode):
    plain = build()
    plain.train()
    ours = build({"mode": mode, "denominator": "all", **NEUTRAL[mode]})
    ours.train()
    assert torch.equal(tiny_trainer.parameters(plain), tiny_trainer.parameters(ours))


def parts_of(trainer):
    """Every micro-batch of a training, as it was judged."""
    parts, judge = [], trainer._weigh_tokens
    trainer._weigh_tokens = lambda *args: (parts.append(judge(*args)), parts[-1])[1]
    trainer.train()
    return parts


def test_each_rival_weighs_the_tokens(build):
    """The weights of a training against the formulas, from the full policy's logits."""
    for mode, constants in (
        ("probability", {"probability_alpha": 0.4}),
        ("gradient_norm", {"max_token_gradient": 100.0}),
        ("covariance", {"covariance_frac": 0.2, "covariance_low": -9.0, "covariance_high": 9.0}),
        ("improbable", {"max_policy_shift": 650.0}),
    ):
        trainer = build({"mode": mode, "denominator": "all", "top_k": 1000, **constants}, max_steps=1)
        with torch.no_grad():
            head = trainer.model.lm_head.weight.detach().double().clone()
        (part,) = parts_of(trainer)
        tokens = part.tokens
        policy = (tokens.features.double() @ head.T).softmax(1)
        sampled = tokens.token_ids.gather(1, tokens.action_index[:, None])
        prob, weight = policy.gather(1, sampled)[:, 0], part.by_rule.weight
        if mode == "probability":
            assert torch.allclose(weight.double(), 0.4 * prob + 0.6, atol=1e-6)
        elif mode == "gradient_norm":
            v = torch.zeros_like(policy).scatter_(1, sampled, 1) - policy
            norm = (tokens.advantages.double()[:, None, None] * v[:, :, None] * tokens.features[:, None]).norm(
                dim=(1, 2)
            )
            assert torch.allclose(weight.double(), (100 / norm).clamp(max=1), atol=1e-5)
            assert 0 < (weight < 1).sum() < len(weight)
        elif mode == "covariance":
            assert (weight == 0).sum() == int(0.2 * len(tokens))
        else:
            out, moving = weight == 0, tokens.advantages != 0
            assert out.sum() == (part.by_rule.policy_shift > 650).sum() > 0
            assert prob[out].max() <= prob[~out & moving].min()
        row = tiny_trainer.history(trainer)[0]
        assert row["capo/mean_weight"] == pytest.approx(float(weight.mean()), rel=1e-5)
        assert row["capo/rejected_frac_other"] == pytest.approx(float((weight == 0).float().mean()))
        assert row["capo/policy_shift/max"] > 0


def test_entropy_rule_is_observed(build):
    """TRL's 80/20 trains as TRL does, and the tokens that it leaves out are not committed."""
    plain = build(top_entropy_quantile=0.3)
    plain.train()
    ours = build({"mode": "observe"}, top_entropy_quantile=0.3)
    parts = parts_of(ours)
    assert torch.equal(tiny_trainer.parameters(plain), tiny_trainer.parameters(ours))
    for part, row in zip(parts, tiny_trainer.history(ours), strict=True):
        high = part.entropy >= torch.quantile(part.entropy, 0.7)
        assert torch.equal(part.in_step.weight == 1, high)
        assert row["capo/rejected_frac_other"] == pytest.approx(1 - float(high.float().mean()))


def test_a_skipped_update_moves_nothing(build):
    """The sixth update's gradient is made a hundred times longer: it is dropped, the others are not."""
    trainer = build({"mode": "observe", "skip_gradient_norm": 10.0}, max_steps=7, learning_rate=1e-4)
    moved, norm = [tiny_trainer.parameters(trainer).clone()], trainer._get_grad_norm
    factor = iter([1, 1, 1, 1, 1, 100, 1])

    def longer(model, grad_norm=None):
        return norm(model, next(factor) * grad_norm)

    after = trainer.after_step
    trainer._get_grad_norm = longer
    trainer.after_step = lambda: (moved.append(tiny_trainer.parameters(trainer).clone()), after())
    trainer.train()
    still = [torch.equal(a, b) for a, b in itertools.pairwise(moved)]
    assert still == [False] * 5 + [True, False]
    assert [row["capo/skipped_step"] for row in tiny_trainer.history(trainer)] == [0.0] * 5 + [1.0, 0.0]


def test_the_rate_is_adapted_during_training(build):
    target = 1e-4
    trainer = build(
        {"mode": "observe", "step_rule": "adapt", "step_policy_shift": target}, learning_rate=1e-3, max_steps=6
    )
    rates, after = [], trainer.after_step
    trainer.after_step = lambda: (rates.append(trainer.optimizer.param_groups[0]["lr"]), after())
    trainer.train()
    s = 1.0
    for row, rate in zip(tiny_trainer.history(trainer), rates, strict=True):
        assert row["capo/step_scale"] == pytest.approx(s)
        assert rate == pytest.approx(1e-3 * s)
        kl = row["capo/measured_kl"]
        s = s / 1.5 if kl > 2 * target else min(1.0, s * 1.5) if kl < target / 2 else s
    assert min(rates) < 1e-3 / 2


@pytest.mark.parametrize(
    "capo",
    [
        {"mode": "covariance", "covariance_frac": 0.2, "covariance_low": -9.0, "covariance_high": 9.0},
        {"mode": "observe", "step_rule": "adapt", "step_policy_shift": 1e-4, "skip_gradient_norm": 1.01},
    ],
    ids=["covariance", "adapt and skip"],
)
def test_resuming_is_exact(build, capo):
    """Stopped after six of eight steps and continued: the same parameters, bit for bit."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = build({**capo, "denominator": "all"}, **settings)
    whole.train()
    parted = build({**capo, "denominator": "all"}, **settings)
    parted.train(resume_from_checkpoint=f"{parted.args.output_dir}/checkpoint-6")
    assert torch.equal(tiny_trainer.parameters(whole), tiny_trainer.parameters(parted))
    assert tiny_trainer.history(whole)[-2:] == tiny_trainer.history(parted)[-2:]
