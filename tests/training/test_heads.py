"""Last layers of other kinds: modelled exactly, or refused in one sentence. Tiny random models of each."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, OPTConfig, PhiConfig, Qwen2Config

import tiny_trainer
from open_r1_capo.budget.rules import FLOOR, StepRule
from open_r1_capo.capo import SGDStep, TokenBatch
from open_r1_capo.training import features

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
WIDE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=24, max_position_embeddings=128),
    "phi": PhiConfig(**WIDE, max_position_embeddings=128),
    "qwen2": Qwen2Config(**WIDE, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**WIDE, head_dim=8, final_logit_softcapping=30.0),
    "cohere": CohereConfig(**WIDE, logit_scale=0.5),
}


@pytest.fixture
def model(tiny_tokenizer, tmp_path):
    """Make a random model of a kind, saved with the lab's tokenizer; its folder."""

    def make(kind, cls=None):
        config = CONFIGS[kind]
        config.vocab_size, config.initializer_range = len(tiny_tokenizer), 0.3
        torch.manual_seed(0)
        one = cls(config) if cls else AutoModelForCausalLM.from_config(config)
        head = one.get_output_embeddings()
        if head.bias is not None:
            torch.nn.init.normal_(head.bias)
        one.save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.fixture
def trainer(tiny_policy, tiny_tokenizer, tmp_path):
    def make(capo, folder=tiny_policy, **changes):
        return tiny_trainer.build(folder, tiny_tokenizer, tmp_path / "run", capo, **changes)

    return make


@pytest.mark.parametrize("kind", ["opt", "phi", "qwen2"])
def test_the_policy_is_the_models_own(model, kind):
    """Hidden states of a pass of the model itself, times its head, are its logits: in float64, to rounding."""
    one = AutoModelForCausalLM.from_pretrained(model(kind), dtype=torch.float64).eval()
    ids = torch.randint(1, one.config.vocab_size, (3, 7))
    mask = torch.ones(3, 4, dtype=torch.bool)
    hidden = features.completion_hidden_states(one, ids, torch.ones_like(ids), mask)
    every = torch.arange(one.config.vocab_size).expand(len(hidden), -1)
    ours = features.support_log_probs(one, hidden, every, 0.9)
    theirs = (one(ids).logits[:, -5:-1] / 0.9).log_softmax(-1).flatten(0, 1)
    assert (ours - theirs).abs().max() < 1e-5  # returned in float32
    features.check_head(one)


@pytest.mark.parametrize("kind", ["opt", "phi"])
def test_it_trains_measured_and_masked(model, trainer, kind):
    one = trainer({"mode": "mask", "max_policy_shift": 1e-2}, model(kind), learning_rate=1e-3, disable_dropout=True)
    one.train()
    rows = tiny_trainer.history(one)
    assert all(row["capo/measured_kl"] > 1e-6 and row["capo/batch_policy_shift"] > 0 for row in rows)
    assert all(row["capo/measured_kl_head"] > 0 for row in rows)


def test_dropout_is_refused_or_stopped(model, trainer):
    """OPT applies it as a function, which TRL's `disable_dropout` does not reach: a pass would be another policy's."""
    folder = model("opt")
    with pytest.raises(
        ValueError, match="capo.mode=observe measures .* which dropout makes a random one: set disable_dropout=True"
    ):
        trainer({"mode": "observe"}, folder)
    one = trainer({"mode": "observe"}, folder, disable_dropout=True)
    ids = torch.arange(6)[None]
    one.model.train()
    assert torch.equal(one.model(ids).logits, one.model(ids).logits)


def test_a_bias_steps_with_its_head(model):
    """z = D x is the change of the logits that a step of W and b makes, against autograd in float64."""
    one = AutoModelForCausalLM.from_pretrained(model("phi"), dtype=torch.float64)
    head, rate, temperature = one.get_output_embeddings(), 1e-3, 0.7
    hidden, actions = torch.randn(5, 32, dtype=torch.float64), torch.randint(0, head.out_features, (5,))
    advantages = torch.randn(5, dtype=torch.float64)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) / temperature
    objective = (advantages * logits.log_softmax(1)[torch.arange(5), actions]).sum()
    weight, bias = torch.autograd.grad(objective / 5, (head.weight, head.bias))
    change = (hidden @ weight.T + bias) / temperature
    ids = torch.arange(head.out_features).expand(5, -1)
    x = features.head_input(one, hidden, temperature)
    batch = TokenBatch(x, ids, logits.softmax(1).detach(), actions, advantages)
    step = SGDStep()
    step.commit(batch, torch.ones(5, dtype=torch.float64))
    assert x.shape == (5, 33)
    assert torch.allclose(rate * step.planned(batch), rate * change, rtol=1e-9, atol=1e-12)
    assert torch.allclose(features.head_output(x, temperature, 32), hidden, rtol=1e-15)


@pytest.mark.parametrize(("kind", "setting"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")])
def test_changed_logits_are_refused(model, trainer, kind, setting):
    with pytest.raises(ValueError, match=rf"changes its logits after the LM head \({setting}=.*capo.mode=off"):
        trainer({"mode": "mask"}, model(kind))


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "opt"])
def test_a_budget_without_curvature_takes_every_head(model, trainer, kind):
    """As the refusals say: with capo.mode=off, the KL is measured by TRL's own log-probabilities."""
    one = trainer({"mode": "off"}, model(kind), budget={"rule": "target", "nats": 1e-2}, disable_dropout=True)
    one.train()
    kls = [row["budget/kl"] for row in one.state.log_history if "budget/kl" in row]
    assert len(kls) == 3
    assert all(5e-3 < kl < 1.5e-2 for kl in kls)


@pytest.mark.parametrize("setting", ["logits_soft_cap", "output_logit_soft_cap"])
def test_a_cap_that_trl_does_not_know_is_refused(model, trainer, setting):
    one = AutoModelForCausalLM.from_pretrained(model("qwen2"))
    setattr(one.config, setting, 30.0)
    with pytest.raises(ValueError, match=rf"{setting}=30.0.*TRL's loss"):
        features.check_head(one)


def test_other_logits_than_the_heads_are_seen(model):
    """A model that changes its logits under a name that nobody knows."""
    one = AutoModelForCausalLM.from_pretrained(model("qwen2"))
    forward = one.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    one.forward = doubled
    with pytest.raises(ValueError, match="the logits of Qwen2.* are not those of its LM head"):
        features.check_head(one)


# --- a frozen head (LoRA) -------------------------------------------------------------------------------------------

ASKS_THE_HEAD = {
    "capo.mode=mask": {"mode": "mask"},
    "capo.mode=scale": {"mode": "scale"},
    "capo.mode=gradient_norm": {"mode": "gradient_norm", "max_token_gradient": 1.0},
    "capo.step_policy_shift": {"mode": "observe", "step_policy_shift": 1e-3, "absent_rows": "decay"},
}


@pytest.mark.parametrize("name", ASKS_THE_HEAD)
def test_rules_that_model_the_heads_step_refuse_a_frozen_head(trainer, name):
    with pytest.raises(ValueError, match=f"the LM head is frozen.*{name}.*lora_modules_to_save"):
        trainer(ASKS_THE_HEAD[name], peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize(
    ("capo", "budget"),
    [
        ({"mode": "observe"}, None),
        ({"mode": "observe"}, {"rule": "target", "nats": 1e-3}),
        ({"mode": "probability"}, None),
        ({"mode": "covariance"}, None),
        ({"mode": "observe", "step_rule": "adapt", "step_policy_shift": 1e-3}, None),
    ],
    ids=str,
)
def test_everything_else_trains_with_a_frozen_head(trainer, capo, budget):
    """Its step is none: every shift is 0, and what is measured is the adapters' doing."""
    one = trainer(capo, budget=budget, peft_config=LoraConfig(**LORA, lora_dropout=0.0), learning_rate=1e-2)
    head = one.accelerator.unwrap_model(one.model).get_output_embeddings().weight.clone()
    one.train()
    rows = tiny_trainer.history(one)
    assert all(row["capo/batch_policy_shift"] == row["capo/policy_shift/max"] == 0 for row in rows)
    assert all(row["capo/rejected_frac_policy"] == 0 for row in rows)
    assert rows[-1]["capo/measured_kl"] > 1e-5
    assert torch.equal(one.accelerator.unwrap_model(one.model).get_output_embeddings().weight, head)
    if budget:
        assert all(5e-4 < row["budget/kl"] < 1.5e-3 for row in rows)


def test_a_head_that_lora_trains_whole_is_modelled(trainer):
    one = trainer({"mode": "mask"}, peft_config=LoraConfig(**LORA, modules_to_save=["lm_head"]), learning_rate=1e-3)
    head = one._policy.get_output_embeddings().weight
    before = head.detach().clone()
    one.train()
    assert not torch.equal(head, before)
    assert tiny_trainer.history(one)[0]["capo/batch_policy_shift"] > 0


def test_a_plan_recovers_from_a_prediction_that_is_far_too_large():
    """A measurement below the floor is at most the floor: c falls, and the steps grow again."""
    rule, truth = StepRule(3e-4), 1e-7  # of what is predicted, as with a head that hardly moves
    for _ in range(50):
        factor = rule.factor(0.178)
        rule.observe(measured_kl=0.178 * factor**2 * truth, predicted_kl=0.178 * factor**2)
    assert rule.factor(0.178) == 1.0
    assert rule.calibration * 0.178 * factor**2 >= FLOOR * 0.99  # no further than the bound says


def test_a_bound_below_the_prediction_raises_nothing():
    rule = StepRule(3e-4, calibration=1e-3)
    rule.observe(measured_kl=1e-8, predicted_kl=5e-5)  # c * predicted = 5e-8, below the floor already
    assert rule.calibration == 1e-3
