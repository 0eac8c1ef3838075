"""CAPOTrainer: TRL's `GRPOTrainer` with a weight on every token's gradient.

The seam: TRL's loss calls `_get_per_token_logps_and_entropies` once. While it runs, the backbone's output is kept;
from it come the support, the proposed steps, the shifts and the token weights (all in `capo/`). The weights are
then applied where every loss must pass, on the gradient of the per-token log-probabilities:

    ∂loss/∂logp_i  ←  w_i · (n / Σw) · ∂loss/∂logp_i        (denominator "kept"; without the ratio for "all")

So one forward pass serves both, TRL's loss is neither copied nor told, and whatever it computes (a clipped ratio,
a KL penalty, a sequence-level ratio) is weighted alike. With every weight 1 the gradients are TRL's, bit for bit.

Once per optimizer step, before its last backward pass, the accepted tokens of all micro-batches and ranks are
committed to the optimizer model, which then knows the step and may shorten it (`capo/planning.py`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer

from open_r1_capo.budget.rules import AdaptedRate, NormGuard, StepBudget
from open_r1_capo.capo import AdamStep, SGDStep, TokenBatch, TokenSelection, objective_shift, policy_shift
from open_r1_capo.capo.curvature import predicted_kl, sgd_shifts
from open_r1_capo.settings.capo import CAPOConfig
from open_r1_capo.training import checkpoint
from open_r1_capo.training.features import captured_hidden_states, check_head, policy_support, predicting
from open_r1_capo.training.measure import measure, metrics
from open_r1_capo.training.sampling_drift import SamplingComparison
from open_r1_capo.training.token_records import TokenRecords
from open_r1_capo.training.update import Part, draw, gather_selection, gradient_scale, select, subsets, sum_rows


class CAPOTrainer(GRPOTrainer):
    """TRL's GRPO trainer with curvature-aware token weights.

    Args:
        *args: as `GRPOTrainer`.
        capo: what CAPO does.
        advantage_baseline: `group` (GRPO, Dr.GRPO) or `none`: REINFORCE's advantage is the reward itself.
        records: keeps what became of the tokens of some steps, or None.
        **kwargs: as `GRPOTrainer`.

    Raises:
        ValueError: the model's logits are not a plain linear layer of its hidden states.
    """

    def __init__(
        self,
        *args: Any,
        capo: CAPOConfig,
        advantage_baseline: str = "group",
        records: TokenRecords | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.capo, self.advantage_baseline = capo, advantage_baseline
        self.records = records if self.accelerator.is_main_process and capo.mode != "off" else None
        self.counters = {"completions": 0, "accepted_tokens": 0}
        adapts = capo.step_rule == "adapt"
        self.budget = (
            AdaptedRate(capo.step_policy_shift) if adapts else StepBudget(capo.step_policy_shift, capo.step_feedback)
        )
        self._learns = capo.plans_steps and (adapts or capo.step_feedback)
        self.guard = NormGuard(capo.skip_gradient_norm)
        self.comparison = SamplingComparison()
        self.seconds: dict[str, float] = defaultdict(float)
        self._micro_batch: dict[str, Any] | None = None
        self._parts: list[Part] = []
        self._planned_kl = 0.0  # m_F of the coming update at the rate it will be taken with
        self._scheduled_lrs: list[float] = []
        self._gradient_norm = 0.0  # of the last update, before clipping
        self._skipped = False  # the last update was not taken
        self.add_callback(_UpdateCallback(self))
        policy = self._policy
        if capo.mode != "off":
            check_head(policy)
        config = policy.config.get_text_config()
        self.step_model = (
            SGDStep()
            if capo.optimizer_model == "sgd"
            else AdamStep(
                config.vocab_size,
                config.hidden_size,
                self.args.adam_beta1,
                self.args.adam_beta2,
                self.args.adam_epsilon,
                capo.moment_average,
                capo.absent_rows,
            )
        )

    @property
    def _policy(self) -> Any:
        """The model without the wrappers of accelerate, DeepSpeed and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    # --- the seam ----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        self.comparison.expect(inputs if self._fresh_from_vllm else None)
        if self.capo.mode == "off" or not self.model.training:
            return super()._compute_loss(model, inputs)
        self._micro_batch = inputs
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._micro_batch = None
        if self.accelerator.sync_gradients:
            self._commit()
        return loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        call = (model, input_ids, attention_mask, logits_to_keep, *args)
        if self._micro_batch is None:  # the old or the reference policy's, or an evaluation
            found = super()._get_per_token_logps_and_entropies(*call, **kwargs)
            self.comparison.see(found[0])
            return found
        with captured_hidden_states(self._policy) as captured:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*call, **kwargs)
        self.comparison.see(logps)
        with self._clock("curvature"), torch.no_grad():
            part = self._judge(torch.cat(captured), input_ids, attention_mask, entropies)
            self._parts.append(part)
            scale = gradient_scale(part, self.capo.denominator, self.loss_type)
        if self.capo.weighs:
            # a weight of 0 stops even a gradient that is not finite
            logps.register_hook(lambda gradient: torch.where(scale > 0, gradient * scale, 0).to(gradient.dtype))
        return logps, entropies, aux_loss

    @property
    def _fresh_from_vllm(self) -> bool:
        """Whether the sampler had this step's weights, and TRL does not compare its log-probabilities itself."""
        fresh = self.use_vllm and self._last_loaded_step == self.state.global_step
        return fresh and self.model.training and not self.vllm_importance_sampling_correction

    def _judge(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor, entropies: Tensor) -> Part:
        """Propose, measure and select the tokens of one micro-batch, and hand the accepted ones to the step model."""
        inputs = self._micro_batch
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        h, actions = predicting(hidden, mask), inputs["completion_ids"][mask]
        closed_form = self.capo.optimizer_model == "sgd" and self.capo.granularity == "token"
        support = policy_support(self._policy, h, actions, self.temperature, self.capo.top_k, closed_form)
        advantages = inputs["advantages"]
        advantages = advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages
        tokens = TokenBatch(
            features=h / self.temperature,
            token_ids=support.token_ids,
            probs=support.probs,
            action_index=support.action_index,
            advantages=advantages[mask],
            groups=subsets(inputs, mask, self.capo.granularity),
        )
        lr = self._scheduled_lr()
        if closed_form:
            shifts = sgd_shifts(tokens, support.sums, lr)
        else:
            z = self.step_model.propose(tokens, self.capo.granularity)
            shifts = tuple(shift(tokens, z, lr, self.capo.granularity) for shift in (policy_shift, objective_shift))
        selection, high = self.choose(tokens, support.log_mass, shifts), None
        if self.top_entropy_quantile < 1:
            high = self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)[mask]
        source = (input_ids, attention_mask, mask, inputs.get("completion_rewards"), high)
        part = Part(tokens, selection, support.log_mass, entropies[mask].detach(), *source)
        self.step_model.accumulate(tokens, part.taken.weight.masked_fill(selection.non_finite, 0))
        return part

    def choose(self, tokens: TokenBatch, log_mass: Tensor, shifts: tuple[Tensor, Tensor]) -> TokenSelection:
        """Judge a micro-batch's tokens by the configured rule.

        Args:
            tokens: N tokens.
            log_mass: (N,), log of the policy's probability of each support.
            shifts: m_F and m_H, (N,) each.

        Returns:
            The weight of each token and the reason for it.
        """
        return select(self.capo, tokens, log_mass, shifts, self.generator())

    def generator(self) -> torch.Generator:
        """The randomness of the micro-batch being judged: the same one when the step is taken again."""
        return draw(self.args.seed, self.state.global_step, len(self._parts), self.accelerator.process_index)

    # --- the update --------------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        """Commit the update's accepted tokens, predict its shifts, and shorten its learning rate if it must be."""
        with self._clock("curvature"), torch.no_grad():
            alone = self.accelerator.num_processes == 1
            self.step_model.commit(reduce=None if alone else partial(sum_rows, self.accelerator))
            lr, totals = self._scheduled_lr(), torch.zeros(3, dtype=torch.float64)
            for part in self._parts:
                z = self.step_model.planned(part.tokens)
                kl, objective = predicted_kl(part.tokens, z, lr), objective_shift(part.tokens, z, lr)
                finite = kl.isfinite() & objective.isfinite()
                totals += torch.stack([kl[finite].sum(), objective[finite].sum(), finite.sum()]).double().cpu()
            kl, objective, count = self._sum_ranks(totals).tolist()
            kl, objective = kl / max(1, count), objective / max(1, count)
            scale = self.budget.scale(kl)
            self._planned_kl = kl * scale**2
            self._scheduled_lrs = [group["lr"] for group in self.optimizer.param_groups]
            if scale != 1.0:
                for group in self.optimizer.param_groups:
                    group["lr"] *= scale
            self._record_selection()
        self.record({"capo/batch_policy_shift": kl, "capo/batch_objective_shift": objective})
        self.record({"capo/step_scale": scale, "capo/step_calibration": self.budget.calibration})

    def _record_selection(self) -> None:
        """Log the update's selection over all ranks, and count its accepted tokens."""
        whole, moving = gather_selection(self.accelerator, self._parts)
        self.counters["accepted_tokens"] += int((whole.weight > 0).sum())
        self.record({f"capo/{name}": value for name, value in whole.metrics(moving).items()})

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self._gradient_norm = float(norm)
        return norm

    def before_step(self) -> None:
        """Throw away a gradient that is not finite or, if asked, far larger than usual: no parameter moves.

        Plain TRL would take the step. The optimizer keeps its moments too; the step model has committed by then.
        """
        if self.capo.mode == "off":
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients:  # DeepSpeed has taken the step within its backward pass
            return
        finite = bool(torch.stack([g.detach().sum().isfinite() for g in gradients]).all())
        self._skipped = not finite or self.guard.skips(self._gradient_norm)
        if self._skipped:
            for parameter in self.model.parameters():
                parameter.grad = None
        self.record({"capo/skipped_step": float(self._skipped)})

    def after_step(self) -> None:
        """Restore the schedule's learning rate, and measure how far the policy really moved."""
        if self.capo.mode == "off":
            return
        taken_lr = 0.0 if self._skipped else self.optimizer.param_groups[0]["lr"]
        logs, found = {}, [None] * len(self._parts)
        for group, lr in zip(self.optimizer.param_groups, self._scheduled_lrs, strict=True):
            group["lr"] = lr
        if self.capo.measure_kl > 0:
            with self._clock("measure"):
                share, autocast = self.capo.measure_kl, self.accelerator.autocast
                found = [measure(self._policy, part, share, self.temperature, autocast) for part in self._parts]
                logs = metrics(self.accelerator, self._parts, found)
            self.record({f"capo/{name}": value for name, value in logs.items()})
            if self._learns and not self._skipped:
                self.budget.calibrate(logs["measured_kl"], self._planned_kl)
        if self.records:
            lr, step = self._scheduled_lrs[0], self.state.global_step + 1
            whole = {"step": step, "lr": lr, "taken_lr": taken_lr, "measured_kl": logs.get("measured_kl")}
            self.records.offer(whole, self._parts, found)
        self._parts.clear()

    # --- rewards, counters, logs -------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        with self._clock("generate"):
            output = super()._generate_and_score_completions(inputs)
        self.seconds["generate"] -= self._reward_seconds
        self.seconds["reward"] += self._reward_seconds
        start = self.accelerator.process_index * len(inputs)
        mine = self._rewards[start : start + len(inputs)] * self.reward_weights.to(self._rewards.device)
        rewards = mine.nansum(1)  # unscorable: 0, as TRL
        if self.advantage_baseline == "none":
            output["advantages"] = rewards
        if self.records:
            output["completion_rewards"] = rewards.masked_fill(mine.isnan().all(1), torch.nan)
        if self.model.training:
            self.counters["completions"] += len(inputs) * self.accelerator.num_processes
        return output

    def _calculate_rewards(self, *args, **kwargs):
        start = time.perf_counter()
        rewards = super()._calculate_rewards(*args, **kwargs)
        # a NaN or infinite reward is an unscorable completion, which TRL leaves out of its group
        self._rewards = rewards.masked_fill(~rewards.isfinite(), torch.nan)
        self._reward_seconds = time.perf_counter() - start
        return self._rewards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the counters and the step's seconds to what TRL logs.

        Args:
            logs: TRL's and transformers' values, changed in place.
            start_time: as `Trainer.log`.
        """
        if self.model.training and "loss" in logs:
            total = self.seconds.pop("total", 0.0)
            train = total - sum(self.seconds.values())
            counters = dict(self.counters)
            if self.capo.mode == "off":  # nobody counted them
                del counters["accepted_tokens"]
            logs |= counters | {f"time/{name}": value for name, value in self.seconds.items()}
            logs |= {"time/train": train, "time/total": total, **self.comparison.metrics(self.accelerator)}
            self.seconds.clear()
        super().log(logs, start_time)

    def record(self, values: dict[str, float]) -> None:
        """Put values into the running step's log line."""
        for name, value in values.items():
            self._metrics["train"][name].append(value)

    def _sum_ranks(self, totals: Tensor) -> Tensor:
        return self.accelerator.reduce(totals.to(self.accelerator.device), "sum").cpu()

    def _scheduled_lr(self) -> float:
        """α, the schedule's rate for the coming update."""
        return self.lr_scheduler.get_last_lr()[0]

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a named sum."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - start

    def _now(self) -> float:
        """Seconds, once the accelerator has done what it was asked, so that each block pays for its own work."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # no older one goes before this one is complete
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            extra = {"calibration": self.budget.calibration, "gradient_norms": self.guard.norms, **self.counters}
            checkpoint.save_state(folder, self.step_model, extra)
        self.accelerator.wait_for_everyone()  # the other ranks' shards are part of a complete checkpoint
        if self.args.should_save:
            checkpoint.seal(folder, self.accelerator.num_processes)
            rotate_checkpoints(str(folder.parent), limit, use_mtime=True)

    def _load_optimizer_and_scheduler(self, folder):
        super()._load_optimizer_and_scheduler(folder)
        if folder is not None:
            saved = checkpoint.load_state(Path(folder), self.step_model)
            self.budget.calibration = saved["calibration"]
            self.guard.norms = saved.get("gradient_norms", [])  # older checkpoints have none
            self.counters = {name: int(saved[name]) for name in self.counters}


class _UpdateCallback(TrainerCallback):
    """Calls the trainer at the two moments around `optimizer.step` that have no method to override."""

    def __init__(self, trainer: CAPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.records:
            self.trainer.records.resume(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_step()
        self.trainer.seconds["total"] += time.perf_counter() - self.start
