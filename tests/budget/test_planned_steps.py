"""Planning the step: a budget of KL, kept, restored and calibrated."""

import math

import pytest
import torch

import tiny_trainer


def test_planned_step_shortens_one_update_and_restores_the_schedule(build):
    trainer = build(
        {"mode": "observe", "step_policy_shift": 1e-4, "absent_rows": "decay", "step_feedback": False}, max_steps=4
    )
    rates, after = [], trainer.after_step
    trainer.after_step = lambda: (rates.append(trainer.optimizer.param_groups[0]["lr"]), after())
    trainer.train()
    rows = tiny_trainer.history(trainer)
    for row, rate in zip(rows, rates, strict=True):
        expected = (
            min(1.0, math.sqrt(1e-4 / row["capo/batch_policy_shift"])) if row["capo/batch_policy_shift"] else 1.0
        )
        assert row["capo/step_scale"] == pytest.approx(expected)
        assert rate == pytest.approx(1e-2 * expected)
    assert min(row["capo/step_scale"] for row in rows) < 0.1
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2


def test_planned_steps_keep_their_budget_without_a_gradient(build):
    """When all rewards agree, Adam's momentum still moves every row; the plan must see that."""
    calls = []

    def reward(completion_ids, **kwargs):
        calls.append(1)
        return [1.0] * len(completion_ids) if len(calls) > 3 else tiny_trainer.token_reward(completion_ids)

    capo = {"mode": "observe", "step_policy_shift": 1e-4, "absent_rows": "decay"}
    trainer = build(capo, reward=reward, max_steps=6)
    trainer.train()
    rows = tiny_trainer.history(trainer)
    assert [row["reward_std"] > 0 for row in rows] == [True] * 3 + [False] * 3
    assert all(row["capo/batch_policy_shift"] > 1e-4 for row in rows[3:])
    assert max(row["capo/measured_kl"] for row in rows[3:]) < 2e-3


def test_feedback_calibrates_by_the_measured_kl(build):
    trainer = build({"mode": "observe", "step_policy_shift": 1e-4, "absent_rows": "decay"}, max_steps=3)
    trainer.train()
    rows = tiny_trainer.history(trainer)
    c = 1.0
    for row in rows:
        assert row["capo/step_calibration"] == pytest.approx(c)
        taken = row["capo/batch_policy_shift"] * row["capo/step_scale"] ** 2
        c = math.exp(0.7 * math.log(c) + 0.3 * math.log(row["capo/measured_kl"] / taken))
    assert trainer.step_rule.calibration == pytest.approx(c)


def test_measured_kl_is_the_divergence_of_the_full_policies(build):
    """Against the whole log-softmax before and after the step; exact if the support is the vocabulary."""
    for top_k, lower_bound in ((1000, False), (20, True)):
        trainer = build({"mode": "observe", "top_k": top_k}, max_steps=1, learning_rate=1e-3)
        logits, after = [], trainer.after_step
        judge = trainer._weigh_tokens

        def full(part, trainer=trainer):
            with torch.no_grad():
                out = trainer.model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
            return (out[:, -part.mask.shape[1] - 1 : -1][part.mask] / 0.9).double().log_softmax(-1)

        def judged(*args, judge=judge, logits=logits, full=full):
            part = judge(*args)
            logits.append((part, full(part)))
            return part

        def then_compare(after=after, logits=logits, full=full):
            ((part, old),) = logits
            new = full(part)
            logits.append(float((old.exp() * (old - new)).sum(-1).mean()))
            after()

        trainer._weigh_tokens, trainer.after_step = judged, then_compare
        trainer.train()
        measured = tiny_trainer.history(trainer)[0]["capo/measured_kl"]
        assert measured > 1e-5
        assert measured <= logits[-1] * 1.001 if lower_bound else measured == pytest.approx(logits[-1], rel=1e-3)
