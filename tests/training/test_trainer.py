"""The seam with TRL: off means off, and the weights act as TRL's own mask does."""

import math

import pytest
import torch
from trl import GRPOTrainer

import tiny_trainer
from open_r1_capo.capo import AdamStep
from open_r1_capo.capo.selection import TokenSelection

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
    assert torch.equal(tiny_trainer.parameters(plain), tiny_trainer.parameters(ours))
    for row, reference in zip(tiny_trainer.history(ours), tiny_trainer.history(plain), strict=True):
        assert {name: row[name] for name in reference} == reference


@pytest.mark.parametrize("mode", ["mask", "scale"])
def test_infinite_thresholds_leave_the_entropy_rule_alone(build, mode):
    """TRL's 80/20 rule divides by all tokens: those that it leaves out are none that the mask rejected."""
    plain = build(top_entropy_quantile=0.3)
    plain.train()
    ours = build({"mode": mode, "max_policy_shift": math.inf}, top_entropy_quantile=0.3)
    ours.train()
    assert torch.equal(tiny_trainer.parameters(plain), tiny_trainer.parameters(ours))
    assert all(row["capo/rejected_frac_other"] > 0.5 for row in tiny_trainer.history(ours))


def test_one_micro_batch_is_committed_by_the_engine(build, monkeypatch):
    """The gradient of its rows is never held; of several micro-batches it must be."""
    calls, commit = [], AdamStep._apply_batch
    monkeypatch.setattr(AdamStep, "_apply_batch", lambda *args: (calls.append(args), commit(*args)))
    one = build({"mode": "observe"}, max_steps=2)
    one.train()
    assert len(calls) == one.step_model.step_count == 2
    two = build({"mode": "observe"}, max_steps=2, gradient_accumulation_steps=2)
    two.train()
    assert len(calls) == 2 == two.step_model.step_count


def fixed_selection(trainer, rejected_share, seed=0):
    """Let the trainer reject given tokens, whatever their shifts; returns the masks it was asked for."""
    rng, judge, kept = torch.Generator().manual_seed(seed), trainer._weigh_tokens, []

    def judged(*args):
        part = judge(*args)
        keep = (torch.rand(part.mask.shape, generator=rng) > rejected_share) & part.mask
        keep[0] = False  # a whole sequence
        kept.append(keep)
        columns = [v for k, v in vars(part.by_rule).items() if k != "weight"]
        selection = TokenSelection(keep[part.mask].float(), *columns)
        return type(part)(**{**vars(part), "by_rule": selection})

    trainer._weigh_tokens = judged
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
        part_of = trainer._weigh_tokens
        trainer._weigh_tokens = lambda *a, part_of=part_of: first_half_rejected(part_of(*a))
        found[denominator] = collect_gradients(trainer)
        trainer.train()
    kept, everything = found["kept"][0], found["all"][0]
    assert torch.allclose(kept, 2 * everything, rtol=1e-4, atol=1e-6)


def first_half_rejected(part):
    """Reject three of six tokens in every sequence."""
    assert part.mask.sum(1).eq(6).all()
    weight = torch.tensor([0.0, 1.0] * 3).repeat(len(part.mask))
    columns = [v for k, v in vars(part.by_rule).items() if k != "weight"]
    return type(part)(**{**vars(part), "by_rule": TokenSelection(weight, *columns)})


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


def test_tool_tokens_take_no_part(build):
    """Tokens that TRL's `tool_mask` excludes are neither judged nor committed."""
    trainer = build({"mode": "mask"}, max_steps=1, generation_kwargs={"min_new_tokens": 6})
    prepare, judge, parts = trainer._generate_and_score_completions, trainer._weigh_tokens, []

    def with_tools(inputs):
        batch = prepare(inputs)
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][:, 2:4] = 0
        return batch

    trainer._generate_and_score_completions = with_tools
    trainer._weigh_tokens = lambda *args: (parts.append(judge(*args)), parts[-1])[1]
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
    found, judge = {}, trainer._weigh_tokens

    def judged(inputs, hidden, input_ids, attention_mask, entropies):
        part = judge(inputs, hidden, input_ids, attention_mask, entropies)
        weights = iter(part.by_rule.weight.split(part.mask.sum(1).tolist()))
        for ids, attended, weight in zip(input_ids, attention_mask.bool(), weights, strict=True):
            found.setdefault(tuple(ids[attended].tolist()), []).append(weight)
        return part

    trainer._weigh_tokens = judged
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
    parts, judge = [], trainer._weigh_tokens
    trainer._weigh_tokens = lambda *args: (parts.append(judge(*args)), parts[-1])[1]
    trainer.train()
    for part in parts:
        subset = part.tokens.subsets(granularity)
        for b in subset.unique():
            assert len(part.by_rule.weight[subset == b].unique()) == 1
    sizes = [len(part.tokens.subsets(granularity).unique()) for part in parts]
    assert sizes == [{"sequence": 8, "group": 2, "batch": 1}[granularity]] * 3


def test_sgd_model_uses_the_full_vocabulary(build):
    """The closed form does not depend on the support."""
    rows = []
    for top_k in (1, 1000):
        trainer = build({"mode": "observe", "optimizer_model": "sgd", "top_k": top_k}, max_steps=1)
        trainer.train()
        rows.append(tiny_trainer.history(trainer)[0])
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
    assert torch.allclose(seen[0]["advantages"], torch.tensor(tiny_trainer.token_reward(completions)))
