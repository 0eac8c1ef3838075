"""KLBudgetCallback on TRL's own trainers: every step within its budget, with LoRA, after a resume; what is refused."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM, PretrainedConfig, TrainerCallback
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

import tiny_trainer
from open_r1_capo.tasks.data import to_prompts
from open_r1_capo.training.kl_callback import KLBudgetCallback


class ExactKL(TrainerCallback):
    """Measures every step by hand: the model before and after, on the step's own tokens, over the whole vocabulary."""

    def __init__(self, trainer):
        self.trainer, self.found, self.inputs = trainer, [], []
        loss = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: (self.inputs.append(inputs), loss(model, inputs))[1]

    def log_probs(self):
        rows = []
        for inputs in self.inputs:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            with torch.no_grad():
                logits = self.trainer.model(input_ids=ids, attention_mask=mask).logits / self.trainer.temperature
            keep = inputs["completion_mask"].bool()
            rows.append(logits[:, -keep.shape[1] - 1 : -1][keep].double().log_softmax(1))
        return torch.cat(rows)

    def on_step_begin(self, args, state, control, **kwargs):
        self.inputs = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.old = self.log_probs()

    def on_step_end(self, args, state, control, **kwargs):
        self.found.append(float((self.old.exp() * (self.old - self.log_probs())).sum(1).mean()))


def build(policy, tokenizer, folder, callback, **changes):
    trainer = tiny_trainer.build(policy, tokenizer, folder, None, **changes)
    trainer.add_callback(callback)
    return trainer


def trained_kls(trainer):
    trainer.train()
    return [row["budget/kl"] for row in trainer.state.log_history if "budget/kl" in row]


@pytest.mark.parametrize("options", [{"rule": "target"}, {"rule": "verify"}, {"rule": "target", "share": 0.5}])
@pytest.mark.parametrize("rate", [1e-5, 1.0])
def test_every_step_is_within_the_budget(tiny_policy, tiny_tokenizer, tmp_path, options, rate):
    callback = KLBudgetCallback(nats=1e-3, **options)
    trainer = build(tiny_policy, tiny_tokenizer, tmp_path, callback, learning_rate=rate, max_steps=6)
    exact = ExactKL(trainer)
    trainer.add_callback(exact)
    trainer.train()
    taken = [row["budget/kl"] for row in trainer.state.log_history if "budget/kl" in row]
    assert len(taken) == len(exact.found) == 6
    assert max(taken) <= 1.5e-3
    assert max(exact.found) <= 1.5e-3 * 3  # the estimate is of a few dozen tokens
    if options["rule"] == "target":
        assert min(taken) >= 1e-3 / 1.5
    elif rate < 1e-4:
        assert all(row["budget/alpha"] == rate for row in trainer.state.log_history if "budget/kl" in row)


def test_no_budget_that_acts_is_no_change(tiny_policy, tiny_tokenizer, tmp_path):
    plain = tiny_trainer.build(tiny_policy, tiny_tokenizer, tmp_path, None, learning_rate=1e-3)
    plain.train()
    callback = KLBudgetCallback(nats=1e9, rule="verify")
    watched = build(tiny_policy, tiny_tokenizer, tmp_path, callback, learning_rate=1e-3)
    watched.train()
    assert torch.equal(tiny_trainer.parameters(plain), tiny_trainer.parameters(watched))


def test_accumulation_clipping_and_reused_batches(tiny_policy, tiny_tokenizer, tmp_path):
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    callback = KLBudgetCallback(entropy_share=1e-3)
    trainer = build(
        tiny_policy, tiny_tokenizer, tmp_path, callback, max_steps=4, max_grad_norm=0.1, beta=0.1, **changes
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "budget/kl" in row]
    assert len(rows) == 4
    assert all(row["budget/kl"] <= 1.5 * row["budget/nats"] for row in rows)
    assert all(row["budget/nats"] == pytest.approx(1e-3 * row["entropy"], rel=0.05) for row in rows)


def test_lora(tiny_policy, tiny_tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    common = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32),
        "reward_funcs": [tiny_trainer.token_reward],
        "args": tiny_trainer.arguments(tmp_path, max_steps=4, learning_rate=1.0),
        "processing_class": tiny_tokenizer,
        "train_dataset": to_prompts(Dataset.from_list(tiny_trainer.PROMPTS), None),
    }
    trainer = GRPOTrainer(**common, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trainer.add_callback(KLBudgetCallback(nats=1e-4))
    kls = trained_kls(trainer)
    assert len(kls) == 4
    assert 0 < max(kls) <= 1.5e-4


def test_rloo(tiny_policy, tiny_tokenizer, tmp_path):
    args = tiny_trainer.arguments(tmp_path, max_steps=3, learning_rate=1.0).to_dict()
    names = ("output_dir", "max_steps", "per_device_train_batch_size", "num_generations", "max_completion_length")
    names += ("learning_rate", "use_cpu", "bf16", "gradient_checkpointing", "save_strategy", "report_to", "seed")
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32),
        reward_funcs=[tiny_trainer.token_reward],
        args=RLOOConfig(**{name: args[name] for name in names}, logging_steps=1, disable_tqdm=True, beta=0.0),
        processing_class=tiny_tokenizer,
        train_dataset=to_prompts(Dataset.from_list(tiny_trainer.PROMPTS), None),
    )
    trainer.add_callback(KLBudgetCallback(nats=1e-3))
    kls = trained_kls(trainer)
    assert len(kls) == 3
    assert 0 < max(kls) <= 1.5e-3


def test_it_goes_on_exactly(tiny_policy, tiny_tokenizer, tmp_path):
    def train(folder, resume=None, **changes):
        changes = {"save_strategy": "steps", "save_steps": 2, **changes}
        callback = KLBudgetCallback(nats=1e-3, schedule="linear")
        trainer = build(tiny_policy, tiny_tokenizer, folder, callback, max_steps=4, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path)
    again = train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert torch.equal(tiny_trainer.parameters(whole), tiny_trainer.parameters(again))
    last = [[row["budget/alpha"] for row in one.state.log_history if "budget/kl" in row][-1] for one in (whole, again)]
    assert last[0] == last[1]


def test_what_is_refused_and_said(tiny_policy, tiny_tokenizer, tmp_path, caplog):
    with pytest.raises(ValueError, match="nats must be greater than 0"):
        KLBudgetCallback(nats=-1)
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        KLBudgetCallback(nats=1e-3, share=0)
    with pytest.raises(ValueError, match="schedule must be one of"):
        KLBudgetCallback(nats=1e-3, schedule="cosine")
    trainer = build(tiny_policy, tiny_tokenizer, tmp_path, KLBudgetCallback(nats=1e-3))
    trainer.add_callback(KLBudgetCallback(nats=1e-3))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match="a KLBudgetCallback already: add it once"),
    ):
        trainer.train()
    assert "learning_rate and its schedule are not used" in caplog.text


def test_a_gradient_that_is_not_finite_moves_nothing(tiny_policy, tiny_tokenizer, tmp_path):
    callback = KLBudgetCallback(nats=1e-3)
    trainer = build(tiny_policy, tiny_tokenizer, tmp_path, callback, max_steps=1)

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            next(model.parameters()).grad.fill_(math.nan)

    trainer.callback_handler.callbacks.insert(0, Poison())
    before = tiny_trainer.parameters(trainer).clone()
    trainer.train()
    assert torch.equal(tiny_trainer.parameters(trainer), before)


def test_dropout_is_refused(tiny_policy, tiny_tokenizer, tmp_path):
    trainer = build(tiny_policy, tiny_tokenizer, tmp_path, KLBudgetCallback(nats=1e-3))
    trainer.model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="set disable_dropout=True"):
        trainer.train()


def test_one_object_twice_is_refused(tiny_policy, tiny_tokenizer, tmp_path):
    callback = KLBudgetCallback(nats=1e-3)
    trainer = build(tiny_policy, tiny_tokenizer, tmp_path, callback)
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="add it once"):
        trainer.train()


@pytest.mark.parametrize("options", [{"tolerance": 0.5}, {"max_passes": 0}])
def test_options_are_checked_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        KLBudgetCallback(nats=1e-3, **options)


def test_fsdp_1_is_refused():
    """Its parameters are flat shards, which the callback does not gather."""

    class Wrapped(FullyShardedDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.config = PretrainedConfig()

        def modules(self):
            return iter([self])

    weights = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match="FSDP 1: set fsdp_version: 2"):
        KLBudgetCallback(nats=1e-3).on_train_begin(
            None, None, None, model=Wrapped(), optimizer=torch.optim.SGD(weights)
        )
