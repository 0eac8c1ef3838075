"""CAPOTrainer: TRL's `GRPOTrainer` with a weight on every token's gradient.

One update, from top to bottom:

1. TRL's loss calls `_get_per_token_logps_and_entropies` once a micro-batch. While it runs, the backbone's output is
   kept; from it come the support, the proposed steps, the shifts and the token weights (`_weigh_tokens`, all in
   `capo/`). The weights act where every loss must pass, on the gradient of the per-token log-probabilities:

       ∂loss/∂logp_i  ←  w_i · (n / Σw) · ∂loss/∂logp_i        (denominator "kept"; without the ratio for "all")

   One forward pass serves both. TRL's loss code runs unmodified and does not know about the weights: whatever it
   computes (a clipped ratio, a KL penalty) is weighted alike. With every weight 1, the gradients are TRL's bit for
   bit.
2. Before the last backward pass, the accepted tokens of all micro-batches and ranks are committed to the optimizer
   model, which then knows the step; the step rule may shorten its rate (`_commit`, `budget/`).
3. Before `optimizer.step`, a gradient that is not finite or unusually large is thrown away (`throws_away`).
4. After it, the true KL is measured on the update's own tokens (`after_step`). The step rule learns from it; or, with
   a KL budget, the parameters are moved along the step until it fits (`budget_trainer.py`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from open_r1_capo.budget.rules import STATE, NormGuard
from open_r1_capo.capo import AdamStep, SGDStep, TokenBatch, TokenSelection, objective_shift, policy_shift
from open_r1_capo.capo.curvature import predicted_kl, sgd_shifts
from open_r1_capo.capo.steps import NoStep
from open_r1_capo.settings.capo import CAPOConfig
from open_r1_capo.training.budget_trainer import BudgetTrainer, token_mask
from open_r1_capo.training.features import (
    captured_hidden_states,
    check_dropout,
    check_head,
    frozen,
    head_input,
    one_late,
    policy_support,
    predicting,
)
from open_r1_capo.training.measure import Measured, measure, metrics
from open_r1_capo.training.ranks import gather_selection, sum_ranks, sum_rows
from open_r1_capo.training.token_records import TokenRecords
from open_r1_capo.training.update import MicroBatch, Update, gradient_scale, step_generator, subsets


class CAPOTrainer(BudgetTrainer):
    """TRL's GRPO trainer with curvature-aware token weights.

    Args:
        *args: as `BudgetTrainer`.
        capo: what CAPO does; with `mode=off`, `BudgetTrainer` or `RunTrainer` is the trainer to use.
        records: keeps what became of the tokens of some steps, or None.
        **kwargs: as `BudgetTrainer`, with the KL budget of a step.

    Raises:
        ValueError: the model has dropout, its logits are not a plain linear layer of its hidden states, or that layer
            is frozen and a rule asks for its step.
    """

    def __init__(
        self,
        *args: Any,
        capo: CAPOConfig,
        records: TokenRecords | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_dropout(self.model, f"capo.mode={capo.mode}")
        check_head(self._policy)
        if frozen(self._policy):
            _refuse_frozen_head(capo)
        self.capo = capo
        self.records = records if self.accelerator.is_main_process else None
        self.counters["accepted_tokens"] = 0
        self.step_rule, self.guard = capo.step, NormGuard(capo.skip_gradient_norm)
        self.step_model = self._optimizer_model()
        self.update = Update()

    def _optimizer_model(self) -> AdamStep | SGDStep | NoStep:
        if frozen(self._policy):
            return NoStep()
        if self.capo.optimizer_model == "sgd":
            return SGDStep()
        head, args = self._policy.get_output_embeddings(), self.args
        adam = (args.adam_beta1, args.adam_beta2, args.adam_epsilon)
        width = head.in_features + (head.bias is not None)  # not always the backbone's: OPT projects
        return AdamStep(head.out_features, width, *adam, self.capo.moment_average, self.capo.absent_rows)

    @property
    def _policy(self) -> Any:
        """The model without the wrappers of accelerate, DeepSpeed and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    # --- 1. each micro-batch: weigh its tokens -----------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training and self.accelerator.sync_gradients:
            self._commit()
        return loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        call = (model, input_ids, attention_mask, logits_to_keep, *args)
        plain = super(BudgetTrainer, self)._get_per_token_logps_and_entropies  # the micro-batch is kept here
        if self._inputs is None:  # the old or the reference policy's, or an evaluation
            return plain(*call, **kwargs)
        with captured_hidden_states(self._policy) as captured:
            logps, entropies, aux_loss = plain(*call, **kwargs)
        with self._clock("curvature"), torch.no_grad():
            micro_batch = self._weigh_tokens(self._inputs, torch.cat(captured), input_ids, attention_mask, entropies)
            self.update.micro_batches.append(micro_batch)
            scale = gradient_scale(micro_batch, self.capo.denominator, self.loss_type)
        if self.capo.weighs:
            # a weight of 0 stops even a gradient that is not finite
            logps.register_hook(lambda gradient: torch.where(scale > 0, gradient * scale, 0).to(gradient.dtype))
        return logps, entropies, aux_loss

    def _weigh_tokens(
        self, inputs: dict[str, Any], hidden: Tensor, input_ids: Tensor, attention_mask: Tensor, entropies: Tensor
    ) -> MicroBatch:
        """Propose each token's step, predict its shifts, weigh it, and hand the accepted ones to the step model."""
        capo, mask = self.capo, token_mask(inputs)
        h = self.packed.predicting(hidden, mask) if self.packed else predicting(hidden, mask)
        actions = inputs["completion_ids"][mask]
        closed_form = isinstance(self.step_model, SGDStep) and capo.granularity == "token"
        support = policy_support(self._policy, h, actions, self.temperature, capo.top_k, closed_form)
        advantages = inputs["advantages"]
        advantages = advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages
        x = head_input(self._policy, h, self.temperature)
        late = capo.hidden_states == "one_late"
        tokens = TokenBatch(
            features=head_input(self._policy, one_late(hidden, mask), self.temperature) if late else x,
            token_ids=support.token_ids,
            probs=support.probs,
            action_index=support.action_index,
            advantages=advantages[mask],
            groups=subsets(inputs, mask, capo.granularity),
        )
        lr = self._coming_lr()
        if closed_form:
            shifts = sgd_shifts(tokens, support.sums, lr)
        else:
            z = self.step_model.propose(tokens, capo.granularity)
            shifts = tuple(shift(tokens, z, lr, capo.granularity) for shift in (policy_shift, objective_shift))
        by_rule, high_entropy = self.select(tokens, support.log_mass, shifts), None
        if self.top_entropy_quantile < 1:
            high_entropy = self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)[mask]
        source = (input_ids, attention_mask, mask, inputs.get("completion_rewards"), high_entropy, self.share_prompts)
        source += (x if late else None,)
        micro_batch = MicroBatch(tokens, by_rule, support.log_mass, entropies[mask].detach(), *source)
        self.step_model.accumulate(tokens, micro_batch.in_step.weight.masked_fill(by_rule.non_finite, 0))
        return micro_batch

    def select(self, tokens: TokenBatch, log_mass: Tensor, shifts: tuple[Tensor, Tensor]) -> TokenSelection:
        """Weigh a micro-batch's tokens by the configured rule; see `TokenRule.select`."""
        return self.capo.rule.select(tokens, log_mass, shifts, self.generator())

    def generator(self) -> torch.Generator:
        """The randomness of the micro-batch being judged: the same one when the step is taken again."""
        numbers = (self.args.seed, self.state.global_step, len(self.update.micro_batches))
        return step_generator(*numbers, self.accelerator.process_index)

    # --- 2. the whole update: commit, predict, shorten ---------------------------------------------------------------

    def _commit(self) -> None:
        """Commit the update's accepted tokens, predict its shifts, and let the step rule shorten its rate."""
        update = self.update
        with self._clock("curvature"), torch.no_grad():
            alone = self.accelerator.num_processes == 1
            self.step_model.commit(reduce=None if alone else partial(sum_rows, self.accelerator))
            kl, objective = self._predicted_shifts()
            self.step_rule.foresee(self._mean_length())
            factor = self.step_rule.factor(kl)
            update.planned_kl, update.rate = kl * factor**2, self._coming_lr()
            update.scheduled_lrs = [group["lr"] for group in self.optimizer.param_groups]
            if factor != 1.0:
                for group in self.optimizer.param_groups:
                    group["lr"] *= factor
            whole, moving = gather_selection(self.accelerator, update.micro_batches)
            self.counters["accepted_tokens"] += int((whole.weight > 0).sum())
            self.record({f"capo/{name}": value for name, value in whole.metrics(moving).items()})
        self.record({"capo/batch_policy_shift": kl, "capo/batch_objective_shift": objective})
        self.record({"capo/step_scale": factor, "capo/step_calibration": self.step_rule.calibration})

    def _predicted_shifts(self) -> tuple[float, float]:
        """m_F and m_H of the update at the scheduled rate: means over the tokens of all ranks, in nats and reward."""
        lr, totals = self._coming_lr(), torch.zeros(3, dtype=torch.float64)
        for one in self.update.micro_batches:
            z = self.step_model.planned(one.tokens)
            kl, objective = predicted_kl(one.tokens, z, lr), objective_shift(one.tokens, z, lr)
            finite = kl.isfinite() & objective.isfinite()
            totals += torch.stack([kl[finite].sum(), objective[finite].sum(), finite.sum()]).double().cpu()
        kl, objective, count = sum_ranks(self.accelerator, totals).tolist()
        return kl / max(1, count), objective / max(1, count)

    def _mean_length(self) -> float:
        """Tokens of a completion that take part in the update, on average over all ranks."""
        masks = [one.mask for one in self.update.micro_batches]
        totals = torch.tensor([sum(int(m.sum()) for m in masks), sum(map(len, masks))], dtype=torch.float64)
        tokens, completions = sum_ranks(self.accelerator, totals).tolist()
        return tokens / completions

    def _coming_lr(self) -> float:
        """α, the rate of the coming update: the schedule's, or where a KL budget is the target its own estimate."""
        if self.budget and self.budget.rule == "target":
            return self.budget.alpha
        return self.lr_scheduler.get_last_lr()[0]

    # --- 3. before the step: throw it away? --------------------------------------------------------------------------

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self.update.gradient_norm = float(norm)
        return norm

    def before_step(self) -> None:
        """As `BudgetTrainer`; DeepSpeed has taken the step within its backward pass."""
        if all(p.grad is None for p in self.model.parameters()):
            return
        super().before_step()
        self.record({"capo/skipped_step": float(self.skipped)})

    def throws_away(self) -> bool:
        """Whether the gradient is not finite or, if asked, far larger than usual.

        Plain TRL would take the step. The optimizer keeps its moments too; the step model has committed by then.
        """
        return super().throws_away() or self.guard.skips(self.update.gradient_norm)

    def entropies(self) -> list[Tensor]:
        """The policy's entropy at the update's tokens, in nats: (N,) of each micro-batch."""
        return [one.entropy for one in self.update.micro_batches]

    # --- 4. after the step: measure it -------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Settle or measure the step, and restore the schedule's learning rate."""
        taken_lr = 0.0 if self.skipped else self.optimizer.param_groups[0]["lr"]
        self._measured: tuple[dict[str, float], list[Measured]] = {}, [None] * len(self.update.micro_batches)
        if self.budget and not self.skipped:
            taken_lr = self.settle()
        update, self.update, (logs, found) = self.update, Update(), self._measured
        for group, lr in zip(self.optimizer.param_groups, update.scheduled_lrs, strict=True):
            group["lr"] = lr
        if self.capo.measure_kl > 0 and not logs:
            with self._clock("measure"):
                logs, found = self._measure(update, self.capo.measure_kl)
            if self.step_rule.learns and not self.skipped:
                self.step_rule.observe(logs["measured_kl"], update.planned_kl)
        self.record({f"capo/{name}": value for name, value in logs.items()})
        if self.records:
            lr, step = update.rate, self.state.global_step + 1
            whole = {"step": step, "lr": lr, "taken_lr": taken_lr, "measured_kl": logs.get("measured_kl")}
            self.records.offer(whole, update.micro_batches, found)
        self.skipped = False

    def _measure(self, update: Update, share: float) -> tuple[dict[str, float], list[Measured]]:
        """The policy as it is now against the one before the step: metrics over all ranks, and a part of each."""
        how = (share, self.temperature, self.accelerator.autocast)
        found = [measure(self._policy, one, *how) for one in update.micro_batches]
        return metrics(self.accelerator, update.micro_batches, found), found

    def measured_kl(self) -> float:
        """The KL of the step on the support, exact; a lower bound where the support is not the whole vocabulary."""
        self._measured = self._measure(self.update, self.budget_config.share)
        logs = self._measured[0]
        return math.inf if logs["measured_non_finite"] > 0 else logs["measured_kl"]

    def settle(self) -> float:
        """As `BudgetTrainer`; what is recorded of the tokens is the step that was taken, not the last one tried."""
        rate = super().settle()
        if self._measured[0].get("measured_kl") != self.taken.kl:  # it went back to a shorter step, or to none
            with self._clock("measure"):
                self.measured_kl()
        return rate

    # --- records and checkpoints -------------------------------------------------------------------------------------

    def before_training(self) -> None:
        """Delete the token records of steps that will be taken again."""
        if self.records:
            self.records.resume(self.state.global_step)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.records:
            output["completion_rewards"] = self._own_rewards
        return output

    def _state(self):
        state, numbers = super()._state()
        numbers |= {name: getattr(self.step_rule, name) for name in STATE if hasattr(self.step_rule, name)}
        numbers |= {"gradient_norms": self.guard.norms}
        return state | self.step_model.state_dict(), numbers

    def _load_state(self, state, numbers):
        super()._load_state(state, numbers)
        self.step_model.load_state_dict(state)
        for name in STATE:
            if hasattr(self.step_rule, name):
                setattr(self.step_rule, name, numbers[name])
        self.guard.norms = numbers.get("gradient_norms", [])  # older checkpoints have none


def _refuse_frozen_head(capo: CAPOConfig) -> None:
    """Raise ValueError if a rule asks for the step of an LM head that takes none."""
    planned = "capo.step_policy_shift" if capo.step.acts and capo.step.predicts else None
    asked = f"capo.mode={capo.mode}" if capo.rule.asks_head else planned
    if asked:
        raise ValueError(
            f"the LM head is frozen (as under LoRA), but {asked} follows from its step: train it too with "
            "lora_modules_to_save=[lm_head], keep the steps short with a KL budget (RECIPE=grpo_budget), or set "
            "capo.mode=off"
        )
