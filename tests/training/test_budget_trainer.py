"""A KL budget in CAPOTrainer: every step measured and kept within it, for every method and rule; off is off."""

import pytest
import torch

import tiny_trainer
from open_r1_capo.settings.budget import BudgetConfig
from open_r1_capo.settings.capo import ConfigError
from open_r1_capo.settings.values import make

METHODS = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
    "drgrpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "reinforce": {"loss_type": "grpo", "scale_rewards": "none", "baseline": "none"},
}
WHOLE = 10_000  # the support is the vocabulary: measured KLs are exact, not lower bounds
OBSERVE = {"mode": "observe", "top_k": WHOLE}
MASK = {"mode": "mask", "max_policy_shift": 1e-2, "top_k": WHOLE}
SCALE = {"mode": "scale", "max_policy_shift": 1e-4, "denominator": "all", "top_k": WHOLE}


def steps(trainer):
    return [row for row in trainer.state.log_history if "budget/kl" in row]


def policy_kls(trainer):
    """Follows the run: the exact KL of every step, over the whole vocabulary of the step's tokens."""
    found, weigh, after = [], trainer._weigh_tokens, trainer.after_step
    tokens = []

    def log_probs():
        rows = []
        for ids, attention, mask in tokens:
            with torch.no_grad():
                logits = trainer.model(input_ids=ids, attention_mask=attention).logits / trainer.temperature
            rows.append(logits[:, -mask.shape[1] - 1 : -1][mask].double().log_softmax(1))
        return torch.cat(rows)

    def weighed(inputs, hidden, ids, attention, entropies):
        part = weigh(inputs, hidden, ids, attention, entropies)
        tokens.append((ids, attention, part.mask))
        return part

    def measured():
        old = before[-1]
        after()
        found.append(float((old.exp() * (old - log_probs())).sum(1).mean()))
        tokens.clear()

    before, step = [], trainer.before_step
    trainer.before_step = lambda: (before.append(log_probs()), step())
    trainer._weigh_tokens, trainer.after_step = weighed, measured
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("capo", [OBSERVE, MASK, SCALE], ids=["observe", "mask", "scale"])
@pytest.mark.parametrize("rule", ["target", "verify"])
def test_every_step_keeps_its_budget(build, method, capo, rule):
    trainer = build(capo, budget={"rule": rule, "nats": 1e-3}, max_steps=5, learning_rate=1.0, **METHODS[method])
    exact = policy_kls(trainer)
    trainer.train()
    rows = steps(trainer)
    assert len(rows) == len(exact) == 5
    for row, kl in zip(rows, exact, strict=True):
        assert row["budget/kl"] == row["capo/measured_kl"] <= 1.5e-3
        assert row["budget/kl"] == pytest.approx(kl, rel=1e-3, abs=5e-7)  # float32
        if rule == "target" and kl > 0:
            assert row["budget/kl"] >= 1e-3 / 1.5 or row["budget/passes"] == 8
    assert trainer.optimizer.param_groups[0]["lr"] == 1.0


def test_a_share_of_the_entropy_and_of_the_sequences(build):
    budget = {"rule": "target", "entropy_share": 1e-3, "share": 0.5}
    trainer = build({"mode": "observe"}, budget=budget, max_steps=4)
    trainer.train()
    for row in steps(trainer):
        assert row["budget/nats"] == pytest.approx(1e-3 * row["entropy"], rel=0.05)
        assert row["budget/kl"] <= 1.5 * row["budget/nats"]


def test_micro_batches_reused_batches_and_clipping(build):
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    changes |= {"max_grad_norm": 0.1, "beta": 0.1, "max_steps": 4}
    trainer = build(MASK, budget={"rule": "target", "nats": 1e-4}, **changes)
    exact = policy_kls(trainer)
    trainer.train()
    assert max(exact) <= 1.5e-4
    assert len(exact) == 4


def test_a_budget_that_never_acts_is_no_change(build):
    plain = build({"mode": "observe"}, max_steps=3)
    plain.train()
    watched = build({"mode": "observe"}, budget={"rule": "verify", "nats": 1e9}, max_steps=3)
    watched.train()
    assert torch.equal(tiny_trainer.parameters(plain), tiny_trainer.parameters(watched))


def test_none_is_off(build):
    trainer = build({"mode": "observe"}, budget={"rule": "none"}, max_steps=1)
    trainer.train()
    assert trainer.budget is None
    assert not steps(trainer)


def test_it_goes_on_exactly(build, tmp_path):
    def train(resume=None):
        budget = {"rule": "target", "entropy_share": 1e-3, "schedule": "cosine2"}
        trainer = build(MASK, budget=budget, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train()
    again = train(resume=str(tmp_path / "checkpoint-2"))
    assert torch.equal(tiny_trainer.parameters(whole), tiny_trainer.parameters(again))
    assert whole.budget.state_dict() == again.budget.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "aim"}, "budget.rule must be one of none, target, verify"),
        ({"rule": "target"}, "needs either budget.nats or budget.entropy_share"),
        ({"rule": "target", "nats": 1e-3, "entropy_share": 0.1}, "are both set: add budget.entropy_share=null"),
        ({"rule": "target", "nats": 0.0}, "budget.nats must be greater than 0"),
        ({"rule": "target", "nats": 1e-3, "share": 0.0}, "budget.share must be above 0"),
        ({"rule": "target", "nats": 1e-3, "schedule": "cosine"}, "budget.schedule must be one of"),
        ({"rule": "target", "nats": 1e-3, "tolerance": 1.0}, "budget.tolerance must be greater than 1"),
        ({"rule": "target", "nats": 1e-3, "max_passes": 0}, "budget.max_passes must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(BudgetConfig, settings, "budget.")
