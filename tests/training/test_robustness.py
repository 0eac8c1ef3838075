"""What must never break: no tokens, no advantages, values that are not finite, and the metrics' names."""

import json
import math

import pytest
import torch

import tiny_trainer


def test_all_tokens_rejected_leaves_the_parameters(build):
    trainer = build({"mode": "mask", "max_policy_shift": 1e-30}, max_steps=2)
    before = tiny_trainer.parameters(trainer).clone()
    trainer.train()
    assert tiny_trainer.history(trainer)[0]["capo/rejected_frac"] == 1
    assert torch.equal(before, tiny_trainer.parameters(trainer))


@pytest.mark.parametrize("mode", ["observe", "mask", "scale"])
def test_no_advantage_at_all(build, mode):
    trainer = build(
        {"mode": mode, "max_policy_shift": 1e-3 if mode != "observe" else math.inf},
        reward=lambda completion_ids, **k: [1.0] * len(completion_ids),
        max_steps=2,
    )
    before = tiny_trainer.parameters(trainer).clone()
    trainer.train()
    assert torch.equal(before, tiny_trainer.parameters(trainer))
    assert tiny_trainer.history(trainer)[0]["capo/rejected_frac"] == 0


def test_one_token_completions(build):
    trainer = build({"mode": "mask", "max_policy_shift": 1e-2}, max_completion_length=1, max_steps=2)
    trainer.train()
    assert tiny_trainer.parameters(trainer).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_rewards_that_are_no_numbers_are_left_out(build, bad):
    def reward(completion_ids, **kwargs):
        values = tiny_trainer.token_reward(completion_ids)
        return [bad, *values[1:]]

    for baseline in ("group", "none"):
        trainer = build({"mode": "observe"}, reward=reward, max_steps=2, baseline=baseline)
        trainer.train()
        assert tiny_trainer.parameters(trainer).isfinite().all()
        assert all(math.isfinite(row["reward"]) for row in tiny_trainer.history(trainer))


@pytest.mark.parametrize("mode", ["observe", "mask", "scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_hidden_states_never_reach_the_parameters(build, mode, value):
    """A NaN or inf in h costs a step, never a parameter: its tokens are rejected, its gradient thrown away."""
    trainer = build({"mode": mode}, max_steps=3, learning_rate=1e-3)
    norm, calls = trainer.model.model.norm, []

    def break_once(module, args, output):
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 2:
                return output.index_fill(0, torch.tensor([0]), value)
        return None

    norm.register_forward_hook(break_once)
    trainer.train()
    rows = tiny_trainer.history(trainer)
    assert tiny_trainer.parameters(trainer).isfinite().all()
    assert [row["capo/skipped_step"] for row in rows] == [0, 1, 0]
    assert rows[1]["capo/rejected_frac_non_finite"] == (0 if mode == "observe" else pytest.approx(1 / 8, abs=0.1))
    assert trainer.step_model.state_dict()["first_moment"].isfinite().all()


def test_a_model_that_caps_its_logits_is_refused(build, monkeypatch):
    from transformers import Qwen2Config

    monkeypatch.setattr(Qwen2Config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0"):
        build({"mode": "observe"})


def test_metric_names_are_the_contract(build):
    trainer = build({"mode": "mask", "max_policy_shift": 1e-2})
    trainer.train()
    row = [row for row in trainer.state.log_history if "reward" in row][-1]
    shifts = [f"capo/{kind}_shift/{key}" for kind in ("policy", "objective") for key in ("mean", "p99", "max")]
    names = {
        "completions",
        "accepted_tokens",
        "reward",
        "capo/rejected_frac",
        "capo/rejected_frac_policy",
        "capo/rejected_frac_objective",
        *shifts,
        "capo/batch_policy_shift",
        "capo/batch_objective_shift",
        "capo/step_scale",
        "capo/step_calibration",
        "capo/measured_kl",
        "grad_norm",
        "entropy",
        *(f"time/{part}" for part in ("generate", "reward", "curvature", "train", "total")),
    }
    assert names <= row.keys()
    assert row["completions"] == 24
    json.dumps(row)
