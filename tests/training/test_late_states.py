"""What `fidelity=paper` asks of the trainer: another hidden state for the step model, and prompts cut on the left."""

import torch

import tiny_trainer


def judged(build, hidden_states):
    """A short training that only observes; its micro-batches, and the model's own hidden states of each (B, L, D)."""
    trainer = build({"mode": "observe", "hidden_states": hidden_states}, max_steps=2)
    parts, states, judge = [], [], trainer._weigh_tokens

    def keep(inputs, hidden, *args):
        states.append(hidden)
        parts.append(judge(inputs, hidden, *args))
        return parts[-1]

    trainer._weigh_tokens = keep
    trainer.train()
    return parts, states, tiny_trainer.history(trainer)


def test_late_hidden_states_are_the_tokens_own_and_change_the_shifts_alone(build):
    aligned, _, before = judged(build, "aligned")
    late, states, after = judged(build, "one_late")
    for old, new, hidden in zip(aligned, late, states, strict=True):
        length = new.mask.shape[1]
        for shift, features in ((1, new.head_features), (0, new.tokens.features)):
            rows = [
                hidden[b, hidden.shape[1] - length + t - shift] / 0.9
                for b in range(len(new.mask))
                for t in range(length)
                if new.mask[b, t]
            ]
            assert torch.equal(features, torch.stack(rows))
        assert torch.equal(new.head_features, old.tokens.features)
        assert torch.equal(new.tokens.probs, old.tokens.probs)
        assert old.head_features is None
        assert not torch.equal(new.by_rule.policy_shift, old.by_rule.policy_shift)
    for old, new in zip(before, after, strict=True):
        same = {name for name in old if old[name] == new[name]}
        assert {"capo/measured_kl", "capo/measured_kl_head", "loss", "grad_norm"} <= same
        assert not {"capo/policy_shift/mean", "capo/batch_policy_shift"} & same


def test_a_long_prompt_is_cut_to_its_last_tokens(build):
    trainer = build({"mode": "off"})
    prompts = trainer.train_dataset["prompt"][:4]
    whole, *rest = trainer._tokenize_prompts(prompts)
    shortest = min(map(len, whole))
    trainer.max_prompt_tokens = shortest - 2
    cut, *others = trainer._tokenize_prompts(prompts)
    assert cut == [ids[len(ids) - shortest + 2 :] for ids in whole]
    assert others == rest
