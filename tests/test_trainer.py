"""The seam with TRL: off means off, and the weights act as TRL's own mask does."""

import json
import math

import pytest
import torch
from trl import GRPOTrainer

import oracle
import training
from open_r1_capo.capo.selection import TokenSelection


@pytest.fixture
def build(tiny_policy, tiny_tokenizer, tmp_path):
    return lambda *args, **kwargs: training.build(tiny_policy, tiny_tokenizer, tmp_path, *args, **kwargs)


METHODS = {
    "grpo": {"loss_type": "grpo"},
    "drgrpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "reinforce": {"loss_type": "grpo", "scale_rewards": "none", "baseline": "none"},
}


@pytest.mark.parametrize("capo", [{"mode": "off"}, {"mode": "observe"}, {"mode": "mask"}, {"mode": "scale"}], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        {"loss_type": "grpo", "beta": 0.1, "gradient_accumulation_steps": 2},
        {"loss_type": "dapo", "num_iterations": 2},
    ],
)
def test_off_means_off(build, capo, method):
    """CAPO disabled, observing, or with infinite thresholds is plain TRL, bit for bit, after 3 steps."""
    if capo["mode"] in ("mask", "scale") and method["loss_type"] == "dapo":
        capo = {**capo, "denominator": "all"}
    plain = build(**method)  # building seeds the generator, so train before the next is built
    plain.train()
    ours = build(capo, **method)
    ours.train()
    assert torch.equal(training.parameters(plain), training.parameters(ours))
    for row, reference in zip(training.history(ours), training.history(plain), strict=True):
        assert {name: row[name] for name in reference} == reference


def fixed_selection(trainer, rejected_share, seed=0):
    """Let the trainer reject given tokens, whatever their shifts; returns the masks it was asked for."""
    rng, judge, kept = torch.Generator().manual_seed(seed), trainer._judge, []

    def judged(*args):
        part = judge(*args)
        keep = (torch.rand(part.mask.shape, generator=rng) > rejected_share) & part.mask
        keep[0] = False  # a whole sequence
        kept.append(keep)
        columns = [v for k, v in vars(part.selection).items() if k != "weight"]
        selection = TokenSelection(keep[part.mask].float(), *columns)
        return type(part)(**{**vars(part), "selection": selection})

    trainer._judge = judged
    return kept


def gradients(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def collect_gradients(trainer):
    """The gradient of every optimizer step, as it is before clipping."""
    seen, clip = [], trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda model: (seen.append(gradients(trainer)), clip(model))[1]
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("iterations", [1, 2])
def test_weights_act_as_the_tool_mask(build, monkeypatch, method, accumulation, beta, iterations):
    """A rejected token's gradient is that of TRL's loss without it: `tool_mask` is TRL's own exclusion."""
    settings = METHODS[method] | {"beta": beta, "num_iterations": iterations, "max_steps": 2, "learning_rate": 1e-3}
    settings |= {"gradient_accumulation_steps": accumulation}
    ours = build({"mode": "mask"}, **settings)
    kept, expected, seen = fixed_selection(ours, 0.3), [], collect_gradients(ours)
    ours_loss = ours._compute_loss

    def both(model, inputs):
        loss = ours_loss(model, inputs)
        reference = GRPOTrainer._compute_loss(ours, model, inputs | {"tool_mask": kept[-1].int()})
        parameters = list(model.parameters())
        expected.append(torch.cat([g.flatten() for g in torch.autograd.grad(reference, parameters)]))
        return loss

    monkeypatch.setattr(ours, "_compute_loss", both)
    ours.train()
    assert len(seen) == 2
    for step, actual in enumerate(seen):
        reference = sum(expected[step * accumulation : (step + 1) * accumulation])
        assert reference.abs().max() > 0
        assert (actual - reference).abs().max() <= 2e-6 * reference.abs().max()


def test_denominator_all_divides_by_every_token(build):
    """Leaving the count alone is another algorithm: the gradient of a sequence shrinks by its kept share."""
    found = {}
    for denominator in ("kept", "all"):
        full_length = {"min_new_tokens": 6}
        capo = {"mode": "mask", "denominator": denominator}
        trainer = build(capo, max_steps=1, learning_rate=1e-3, generation_kwargs=full_length)
        part_of = trainer._judge
        trainer._judge = lambda *a, part_of=part_of: first_half_rejected(part_of(*a))
        found[denominator] = collect_gradients(trainer)
        trainer.train()
    kept, everything = found["kept"][0], found["all"][0]
    assert torch.allclose(kept, 2 * everything, rtol=1e-4, atol=1e-6)


def first_half_rejected(part):
    """Reject three of six tokens in every sequence."""
    assert part.mask.sum(1).eq(6).all()
    weight = torch.tensor([0.0, 1.0] * 3).repeat(len(part.mask))
    columns = [v for k, v in vars(part.selection).items() if k != "weight"]
    return type(part)(**{**vars(part), "selection": TokenSelection(weight, *columns)})


def test_rejected_tokens_have_no_influence(build):
    """Whatever the advantage of a rejected token is, no gradient changes."""
    found = []
    for disturbance in (0.0, 123.0, math.inf):
        trainer = build({"mode": "mask"}, max_steps=1, learning_rate=1e-3)
        kept, seen = fixed_selection(trainer, 0.4), collect_gradients(trainer)
        compute = GRPOTrainer._compute_loss

        def disturbed(self, model, inputs, kept=kept, disturbance=disturbance, compute=compute):
            logps = self._get_per_token_logps_and_entropies

            def then_disturb(*args, **kwargs):
                result = logps(*args, **kwargs)
                spread = inputs["advantages"][:, None].expand(kept[-1].shape)
                inputs["advantages"] = torch.where(kept[-1], spread, spread + disturbance)
                return result

            self._get_per_token_logps_and_entropies = then_disturb
            try:
                return compute(self, model, inputs)
            finally:
                del self._get_per_token_logps_and_entropies

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GRPOTrainer, "_compute_loss", disturbed)
            trainer.train()
        found.append(seen[0])
    assert found[0].abs().max() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


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
    moments, parts, judge, commit, rejected = [first, first.clone()], [], trainer._judge, trainer._commit, []

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
                    assert part.selection.policy_shift[i] == pytest.approx(float(m_f), rel=2e-2, abs=1e-5)
                    assert part.selection.objective_shift[i] == pytest.approx(float(m_h), rel=2e-2, abs=1e-3)
                if part.selection.weight[i] > 0:
                    total += gradient
                    count[batch.token_ids[i, oracle.occupied_slots(batch, i)]] += float(batch.advantages[i] != 0)
                    tokens += 1
        rejected.append(torch.cat([part.selection.weight == 0 for part in parts]).double().mean().item())
        touched = total.abs().sum(1, keepdim=True) > 0
        mean = total / (count.clamp(min=1) if average == "per_logit" else max(1, tokens))
        for moment, beta, value in zip(moments, (0.9, 0.999), (mean, mean**2), strict=True):
            moment.copy_(torch.where(touched | (absent == "decay"), beta * moment + (1 - beta) * value, moment))
        commit()
        state = trainer.step_model.state_dict()
        rows = state["first_moment"] * (0.9 ** (step - state["last_step"][:, None]) if absent == "decay" else 1)
        assert (rows - moments[0][state["token_ids"]]).abs().max() < 1e-4 * moments[0].abs().max()
        parts.clear()

    trainer._judge, trainer._commit = recorded, checked
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


def test_tool_tokens_take_no_part(build):
    """Tokens that TRL's `tool_mask` excludes are neither judged nor committed."""
    trainer = build({"mode": "mask"}, max_steps=1, generation_kwargs={"min_new_tokens": 6})
    prepare, judge, parts = trainer._generate_and_score_completions, trainer._judge, []

    def with_tools(inputs):
        batch = prepare(inputs)
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][:, 2:4] = 0
        return batch

    trainer._generate_and_score_completions = with_tools
    trainer._judge = lambda *args: (parts.append(judge(*args)), parts[-1])[1]
    trainer.train()
    assert parts[0].mask.tolist() == [[True, True, False, False, True, True]] * 8


def test_every_step_is_logged_with_reused_completions(build):
    trainer = build({"mode": "observe"}, num_iterations=2, max_steps=4)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert ["reward" in row for row in rows] == [True, False, True, False]
    assert all("capo/measured_kl" in row for row in rows)


def masks_by_sequence(trainer):
    """Token weights of the first update, by completion text, whatever the order and the padding."""
    found, judge = {}, trainer._judge

    def judged(hidden, input_ids, attention_mask):
        part = judge(hidden, input_ids, attention_mask)
        weights = iter(part.selection.weight.split(part.mask.sum(1).tolist()))
        for ids, attended, weight in zip(input_ids, attention_mask.bool(), weights, strict=True):
            found.setdefault(tuple(ids[attended].tolist()), []).append(weight)
        return part

    trainer._judge = judged
    return found


def test_micro_batches_padding_and_order_change_no_mask(build, monkeypatch):
    """The same 24 completions in one, three or six micro-batches, padded further and in another order."""
    # a support of the whole vocabulary: of a random policy, rounding decides which id is the 50th
    bound = {"mode": "mask", "max_policy_shift": 6.0, "max_objective_shift": 8.0, "top_k": 1000}
    reference = None
    for accumulation, extra, flip in ((1, 0, False), (3, 0, False), (6, 3, True)):
        trainer = build(
            bound,
            max_steps=1,
            per_device_train_batch_size=24 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
        )
        found, prepare = masks_by_sequence(trainer), trainer._generate_and_score_completions

        def reshaped(inputs, prepare=prepare, trainer=trainer, extra=extra, flip=flip):
            batch = prepare(inputs)
            pad = batch["prompt_ids"].new_full(
                (len(batch["prompt_ids"]), extra), trainer.processing_class.pad_token_id
            )
            batch["prompt_ids"] = torch.cat([pad, batch["prompt_ids"]], 1)
            batch["prompt_mask"] = torch.cat([torch.zeros_like(pad), batch["prompt_mask"]], 1)
            return {k: v.flip(0) if flip and v.dim() else v for k, v in batch.items()}

        monkeypatch.setattr(trainer, "_generate_and_score_completions", reshaped)
        torch.manual_seed(5)
        trainer.train()
        state = trainer.step_model.state_dict()
        if reference is None:
            reference = (found, state)
            rejected = torch.cat([w for ws in found.values() for w in ws]) == 0
            assert 0.1 < rejected.float().mean() < 0.9
            continue
        assert found.keys() == reference[0].keys()
        assert all(torch.equal(a, b) for key in found for a, b in zip(found[key], reference[0][key], strict=True))
        assert torch.equal(state["token_ids"], reference[1]["token_ids"])
        difference = (state["first_moment"] - reference[1]["first_moment"]).abs().max()
        assert difference < 1e-4 * reference[1]["first_moment"].abs().max()


@pytest.mark.parametrize("granularity", ["sequence", "group", "batch"])
def test_coarse_granularity_judges_its_members_alike(build, granularity):
    trainer = build({"mode": "mask", "granularity": granularity, "max_policy_shift": 1e-2}, learning_rate=1e-3)
    parts, judge = [], trainer._judge
    trainer._judge = lambda *args: (parts.append(judge(*args)), parts[-1])[1]
    trainer.train()
    for part in parts:
        subset = part.tokens.subsets(granularity)
        for b in subset.unique():
            assert len(part.selection.weight[subset == b].unique()) == 1
    sizes = [len(part.tokens.subsets(granularity).unique()) for part in parts]
    assert sizes == [{"sequence": 8, "group": 2, "batch": 1}[granularity]] * 3


def test_sgd_model_uses_the_full_vocabulary(build):
    """The closed form does not depend on the support."""
    rows = []
    for top_k in (1, 1000):
        trainer = build({"mode": "observe", "optimizer_model": "sgd", "top_k": top_k}, max_steps=1)
        trainer.train()
        rows.append(training.history(trainer)[0])
    assert rows[0]["capo/policy_shift/mean"] == rows[1]["capo/policy_shift/mean"] > 0


def test_reinforce_has_no_baseline(build):
    trainer = build({"mode": "observe"}, baseline="none", max_steps=1)
    seen, prepare = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (seen.append(prepare(inputs)), seen[-1])[1]
    trainer.train()
    completions = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(seen[0]["completion_ids"], seen[0]["completion_mask"], strict=True)
    ]
    assert torch.allclose(seen[0]["advantages"], torch.tensor(training.token_reward(completions)))


# --- planning the step -----------------------------------------------------------------------------------------------


def test_planned_step_shortens_one_update_and_restores_the_schedule(build):
    trainer = build(
        {"mode": "observe", "step_policy_shift": 1e-4, "absent_rows": "decay", "step_feedback": False}, max_steps=4
    )
    rates, after = [], trainer.after_step
    trainer.after_step = lambda: (rates.append(trainer.optimizer.param_groups[0]["lr"]), after())
    trainer.train()
    rows = training.history(trainer)
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
        return [1.0] * len(completion_ids) if len(calls) > 3 else training.token_reward(completion_ids)

    capo = {"mode": "observe", "step_policy_shift": 1e-4, "absent_rows": "decay"}
    trainer = build(capo, reward=reward, max_steps=6)
    trainer.train()
    rows = training.history(trainer)
    assert [row["reward_std"] > 0 for row in rows] == [True] * 3 + [False] * 3
    assert all(row["capo/batch_policy_shift"] > 1e-4 for row in rows[3:])
    assert max(row["capo/measured_kl"] for row in rows[3:]) < 2e-3


def test_feedback_calibrates_by_the_measured_kl(build):
    trainer = build({"mode": "observe", "step_policy_shift": 1e-4, "absent_rows": "decay"}, max_steps=3)
    trainer.train()
    rows = training.history(trainer)
    c = 1.0
    for row in rows:
        assert row["capo/step_calibration"] == pytest.approx(c)
        taken = row["capo/batch_policy_shift"] * row["capo/step_scale"] ** 2
        c = math.exp(0.7 * math.log(c) + 0.3 * math.log(row["capo/measured_kl"] / taken))
    assert trainer.budget.calibration == pytest.approx(c)


def test_measured_kl_is_the_divergence_of_the_full_policies(build):
    """Against the whole log-softmax before and after the step; exact if the support is the vocabulary."""
    for top_k, lower_bound in ((1000, False), (20, True)):
        trainer = build({"mode": "observe", "top_k": top_k}, max_steps=1, learning_rate=1e-3)
        logits, after = [], trainer.after_step
        judge = trainer._judge

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

        trainer._judge, trainer.after_step = judged, then_compare
        trainer.train()
        measured = training.history(trainer)[0]["capo/measured_kl"]
        assert measured > 1e-5
        assert measured <= logits[-1] * 1.001 if lower_bound else measured == pytest.approx(logits[-1], rel=1e-3)


# --- what must never break -------------------------------------------------------------------------------------------


def test_all_tokens_rejected_leaves_the_parameters(build):
    trainer = build({"mode": "mask", "max_policy_shift": 1e-30}, max_steps=2)
    before = training.parameters(trainer).clone()
    trainer.train()
    assert training.history(trainer)[0]["capo/rejected_frac"] == 1
    assert torch.equal(before, training.parameters(trainer))


@pytest.mark.parametrize("mode", ["observe", "mask", "scale"])
def test_no_advantage_at_all(build, mode):
    trainer = build(
        {"mode": mode, "max_policy_shift": 1e-3 if mode != "observe" else math.inf},
        reward=lambda completion_ids, **k: [1.0] * len(completion_ids),
        max_steps=2,
    )
    before = training.parameters(trainer).clone()
    trainer.train()
    assert torch.equal(before, training.parameters(trainer))
    assert training.history(trainer)[0]["capo/rejected_frac"] == 0


def test_one_token_completions(build):
    trainer = build({"mode": "mask", "max_policy_shift": 1e-2}, max_completion_length=1, max_steps=2)
    trainer.train()
    assert training.parameters(trainer).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_rewards_that_are_no_numbers_are_left_out(build, bad):
    def reward(completion_ids, **kwargs):
        values = training.token_reward(completion_ids)
        return [bad, *values[1:]]

    for baseline in ("group", "none"):
        trainer = build({"mode": "observe"}, reward=reward, max_steps=2, baseline=baseline)
        trainer.train()
        assert training.parameters(trainer).isfinite().all()
        assert all(math.isfinite(row["reward"]) for row in training.history(trainer))


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
    rows = training.history(trainer)
    assert training.parameters(trainer).isfinite().all()
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
