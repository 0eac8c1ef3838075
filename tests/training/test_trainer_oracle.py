"""A whole run, recomputed from the model's own weights by autograd."""

import pytest
import torch

import oracle


@pytest.mark.parametrize(("average", "absent"), [("per_logit", "hold"), ("per_token", "decay")])
def test_a_whole_run_against_the_dense_oracle(build, average, absent):
    """Shifts, masks and moments of three updates, recomputed from the model's own weights by autograd.

    The schedule is not constant, so a stale learning rate is noticed; some tokens are rejected, so committing them
    is noticed; the temperature is not 1.
    """
    capo = {"mode": "mask", "max_policy_shift": 6.3, "max_objective_shift": 60.0, "top_k": 30}
    trainer = build(
        capo | {"moment_average": average, "absent_rows": absent}, lr_scheduler_type="linear", learning_rate=1e-3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_completion_length=3,
    )  # fmt: skip
    first = torch.zeros(trainer.step_model.vocab_size, trainer.step_model.dim, dtype=torch.float64)
    moments, parts, judge, commit, rejected = [first, first.clone()], [], trainer._weigh_tokens, trainer._commit, []

    def recorded(*args):
        parts.append(judge(*args))
        check_tokens(trainer, parts[-1])
        return parts[-1]

    def checked():
        lr = 1e-3 * (1 - trainer.state.global_step / 3)
        step = trainer.state.global_step + 1
        total, count, tokens = torch.zeros_like(first), torch.zeros(len(first), 1, dtype=torch.float64), 0
        weight = trainer.model.lm_head.weight.detach().double()
        for part in parts:
            batch = oracle_batch(part, weight)
            for i in range(len(batch)):
                gradient = oracle.token_gradient(weight, batch, i)
                if batch.advantages[i] != 0:  # the others need no shift
                    direction = oracle.adam_direction(*moments, gradient, step)
                    m_f, m_h, _ = oracle.shifts(weight, batch, [i], direction, lr)
                    assert part.by_rule.policy_shift[i] == pytest.approx(float(m_f), rel=2e-2, abs=1e-5)
                    assert part.by_rule.objective_shift[i] == pytest.approx(float(m_h), rel=2e-2, abs=1e-3)
                if part.by_rule.weight[i] > 0:
                    total += gradient
                    count[batch.token_ids[i, oracle.occupied_slots(batch, i)]] += float(batch.advantages[i] != 0)
                    tokens += 1
        rejected.append(torch.cat([part.by_rule.weight == 0 for part in parts]).double().mean().item())
        touched = total.abs().sum(1, keepdim=True) > 0
        mean = total / (count.clamp(min=1) if average == "per_logit" else max(1, tokens))
        for moment, beta, value in zip(moments, (0.9, 0.999), (mean, mean**2), strict=True):
            moment.copy_(torch.where(touched | (absent == "decay"), beta * moment + (1 - beta) * value, moment))
        commit()
        state = trainer.step_model.state_dict()
        rows = state["first_moment"] * (0.9 ** (step - state["last_step"][:, None]) if absent == "decay" else 1)
        assert (rows - moments[0][state["token_ids"]]).abs().max() < 1e-4 * moments[0].abs().max()
        parts.clear()

    trainer._weigh_tokens, trainer._commit = recorded, checked
    trainer.train()
    assert len(rejected) == 3
    assert 0.1 < rejected[0] < 0.9


def check_tokens(trainer, part):
    """The token batch against the model's own hidden states and logits."""
    with torch.no_grad():
        out = trainer.model(part.input_ids, attention_mask=part.attention_mask, output_hidden_states=True)
    hidden = trainer.model.model(part.input_ids, attention_mask=part.attention_mask).last_hidden_state
    length = part.mask.shape[1]
    expected = hidden[:, -length - 1 : -1][part.mask] / 0.9
    assert torch.allclose(part.tokens.features, expected, rtol=1e-4, atol=1e-4)
    policy = (out.logits[:, -length - 1 : -1][part.mask] / 0.9).softmax(-1)
    on_support = policy.gather(1, part.tokens.token_ids) * part.tokens.occupied
    renormalised = on_support / on_support.sum(1, keepdim=True)
    assert torch.allclose(part.tokens.probs, renormalised, atol=1e-5)
    assert torch.allclose(part.log_mass.exp(), on_support.sum(1), atol=1e-5)
    sampled = part.tokens.token_ids.gather(1, part.tokens.action_index[:, None])[:, 0]
    assert torch.equal(sampled, part.input_ids[:, -length:][part.mask])


def oracle_batch(part, weight):
    """The part's tokens in float64, with the probabilities of the float64 head."""
    tokens = part.tokens
    features = tokens.features.double()
    logits = torch.einsum("nkd,nd->nk", weight[tokens.token_ids], features)
    probs = logits.masked_fill(~tokens.occupied, -torch.inf).softmax(1)
    return type(tokens)(features, tokens.token_ids, probs, tokens.action_index, tokens.advantages.double())
