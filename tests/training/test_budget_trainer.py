"""A KL budget in CAPOTrainer: every step measured and kept within it, for every method and rule; off is off."""

import pytest
import torch

import tiny_trainer
from open_r1_capo.settings.budget import BudgetConfig
from open_r1_capo.settings.capo import ConfigError
from open_r1_capo.settings.values import make
from open_r1_capo.training.budget_trainer import BudgetTrainer

METHODS = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
    "drgrpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "reinforce": {"loss_type": "grpo", "scale_rewards": "none", "baseline": "none"},
}
WHOLE = 10_000  # the support is the vocabulary: measured KLs are exact, not lower bounds
OBSERVE = {"mode": "observe", "top_k": WHOLE}
MASK = {"mode": "mask", "max_policy_shift": 1e-2, "top_k": WHOLE}
OFF = {"mode": "off"}
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", ["target", "verify"])
def test_without_curvature_the_sampled_kl_is_kept(build, method, rule):
    """The estimate that is bounded is k3 of the step's own tokens, by hand from the model before and after."""
    changes = METHODS[method] | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = build(OFF, budget={"rule": rule, "nats": 1e-3}, max_steps=5, learning_rate=1.0, **changes)
    found, asked, before, after = [], [], trainer.before_step, trainer.after_step

    def log_probs():
        rows = []
        for one in asked:
            ids, attention, width = (one.arguments[k] for k in ("input_ids", "attention_mask", "logits_to_keep"))
            with torch.no_grad():
                logits = trainer.model(input_ids=ids, attention_mask=attention).logits / trainer.temperature
            chosen = logits[:, -width - 1 : -1].double().log_softmax(2)
            rows.append(chosen.gather(2, ids[:, -width:, None])[..., 0][one.mask])
        return torch.cat(rows)

    def step():
        asked[:] = trainer._asked
        found.append(log_probs())
        before()

    def measured():
        after()
        ratio = log_probs() - found[-1]
        found[-1] = float((ratio.exp() - 1 - ratio).mean())

    trainer.before_step, trainer.after_step = step, measured
    trainer.train()
    rows = steps(trainer)
    assert len(rows) == len(found) == 5
    for row, kl in zip(rows, found, strict=True):
        assert row["budget/kl"] == pytest.approx(kl, rel=1e-3, abs=5e-7) and row["budget/kl"] <= 1.5e-3
        if rule == "target" and kl > 0:
            assert row["budget/kl"] >= 1e-3 / 1.5 or row["budget/passes"] == 8
        assert "capo/measured_kl" not in row
        assert row["learning_rate"] == (row["budget/alpha"] if rule == "target" else 1.0)
    assert trainer.optimizer.param_groups[0]["lr"] == 1.0


def test_any_optimizer_keeps_a_budget_without_curvature(build):
    pytest.importorskip("pytorch_optimizer")
    trainer = build(OFF, budget={"rule": "target", "nats": 1e-3}, optimizer="lion", max_steps=4)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "Lion"
    assert all(0 < row["budget/kl"] <= 1.5e-3 for row in steps(trainer))


def test_a_budget_that_never_acts_is_trls_own_step(build):
    plain = build(None, max_steps=3)
    plain.train()
    bounded = build(OFF, budget={"rule": "verify", "nats": 1e9}, max_steps=3)
    bounded.train()
    assert torch.equal(tiny_trainer.parameters(plain), tiny_trainer.parameters(bounded))


def test_a_gradient_that_is_not_finite_takes_no_step(build):
    trainer = build(OFF, budget={"rule": "target", "nats": 1e-3}, max_steps=1)
    start, before = tiny_trainer.parameters(trainer).clone(), trainer.before_step

    def broken():
        next(trainer.model.parameters()).grad.fill_(torch.nan)
        before()

    trainer.before_step = broken
    trainer.train()
    assert torch.equal(tiny_trainer.parameters(trainer), start)


def test_dropout_is_refused(build):
    with pytest.raises(ValueError, match="a KL budget measures the policy of the backward pass, which dropout makes"):
        trainer = build(OFF, disable_dropout=False)
        trainer.model.config.attention_dropout = 0.1
        BudgetTrainer(
            model=trainer.model,
            reward_funcs=trainer.reward_funcs,
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
            budget=BudgetConfig(rule="target", nats=1e-3),
        )


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_a_share_of_the_entropy_and_of_the_sequences(build, mode):
    budget = {"rule": "target", "entropy_share": 1e-3, "share": 0.5}
    trainer = build({"mode": mode}, budget=budget, max_steps=4)
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


@pytest.mark.parametrize("capo", [MASK, OFF], ids=["mask", "off"])
def test_it_goes_on_exactly(build, tmp_path, capo):
    def train(resume=None):
        budget = {"rule": "target", "entropy_share": 1e-3, "schedule": "cosine2"}
        trainer = build(capo, budget=budget, max_steps=4, save_strategy="steps", save_steps=2)
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
