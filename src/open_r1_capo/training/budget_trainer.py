"""BudgetTrainer: TRL's `GRPOTrainer`, each of whose steps is measured and kept within a KL budget.

1. While the loss is computed, what the model was asked and what it answered is kept, of a share of each micro-batch.
2. Before `optimizer.step`, the step's budget and its first length are set (`before_step`).
3. After it, the same is asked again: the KL of the step is estimated from the two (`sampled_kl`), and the parameters
   are moved along the step until it fits (`after_step`, `budget/kl_budget.py`).

Nothing is predicted, so that any optimizer, loss and model will do. `trainer.py` adds CAPO, which measures the exact
KL on its support instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_r1_capo.budget import KLBudget, Schedule, Taken, sampled_kl
from open_r1_capo.settings.budget import BudgetConfig
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.training.features import check_dropout, reshard, stop_dropout
from open_r1_capo.training.ranks import sum_ranks
from open_r1_capo.training.run_trainer import RunTrainer

LEAST_ENTROPY = 1e-6  # nats; a policy that is certain of every token still has a budget


@dataclass(frozen=True)
class Asked:
    """One forward pass of the loss: what the model was asked, and what it answered.

    Attributes:
        arguments: of `_get_per_token_logps_and_entropies`, those of the first B' sequences.
        log_probs: (B', T), log π of the sampled tokens.
        mask: (B', T) bool, the completion tokens that take part.
        entropies: (N,), of the policy at all N tokens of the micro-batch, in nats.
    """

    arguments: dict[str, Any]
    log_probs: Tensor
    mask: Tensor
    entropies: Tensor


class BudgetTrainer(RunTrainer):
    """TRL's GRPO trainer within a KL budget.

    Args:
        *args: as `RunTrainer`.
        budget: the budget of a step; with the rule `none` no step is measured.
        **kwargs: as `RunTrainer`.

    Raises:
        ValueError: the model has dropout, so that its KL from itself is not zero.
    """

    def __init__(self, *args: Any, budget: BudgetConfig | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            stop_dropout(self.model)
        self.budget_config = budget if budget and budget.on else None
        self.budget: KLBudget | None = None  # made with the optimizer
        if self.budget_config:
            check_dropout(self.model)
        self.skipped = False  # the coming step is not taken
        self._nats = 0.0  # its budget
        self.taken: Taken | None = None  # what became of the last step
        self._asked: list[Asked] = []
        self._inputs: dict[str, Any] | None = None  # of the micro-batch whose loss is being computed

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, and the budget of its steps."""
        optimizer = super().create_optimizer(*args, **kwargs)
        config = self.budget_config
        if config and self.budget is None:
            options = {"rule": config.rule, "tolerance": config.tolerance, "max_passes": config.max_passes}
            schedule = Schedule(config.schedule, self.args.max_steps, config.warmup_steps)
            share = config.entropy_share
            try:
                self.budget = KLBudget(optimizer, config.nats, entropy_share=share, schedule=schedule, **options)
            except ValueError as error:
                raise ConfigError(f"budget.rule={config.rule}: {error}") from None
        return optimizer

    # --- 1. each micro-batch -----------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        self._inputs = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._inputs = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
        if self._inputs is not None and self.budget:  # not the old or the reference policy's, nor an evaluation
            self._keep({"input_ids": input_ids, **dict(zip(POSITIONAL, args, strict=False)), **kwargs}, *found[:2])
        return found

    def _keep(self, arguments: dict[str, Any], log_probs: Tensor, entropies: Tensor) -> None:
        mask, size = token_mask(self._inputs), len(log_probs)
        rows = max(1, round(self.budget_config.share * size))  # TRL has shuffled the sequences
        first = {
            name: value[:rows] if isinstance(value, Tensor) and len(value) == size else value
            for name, value in arguments.items()
        } | {"compute_entropy": False}
        self._asked.append(Asked(first, log_probs[:rows].detach(), mask[:rows], entropies[mask].detach()))

    # --- 2. before the step ------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Throw away a gradient that is not finite, or set the length of the coming step within its budget."""
        self.skipped = self.throws_away()
        if self.budget and not self.skipped:
            known = [one[one.isfinite()].double() for one in self.entropies()]
            totals = torch.stack([torch.stack([one.sum(), one.new_tensor(len(one))]) for one in known]).sum(0).cpu()
            total, count = sum_ranks(self.accelerator, totals).tolist()
            self._nats = self.budget.budget(entropy=max(total / max(1, count), LEAST_ENTROPY))
            self.budget.begin(self._nats)
        elif self.budget:
            self.budget.skip()
        if self.skipped:
            for parameter in self.model.parameters():
                parameter.grad = None

    def throws_away(self) -> bool:
        """Whether no parameter shall move: plain TRL would take a step that is not finite."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return bool(gradients) and not bool(torch.stack([g.detach().sum().isfinite() for g in gradients]).all())

    def entropies(self) -> list[Tensor]:
        """The policy's entropy at the update's tokens, in nats: (N,) of each micro-batch."""
        return [one.entropies for one in self._asked]

    # --- 3. after the step -------------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Measure the step, and move along it until its KL fits the budget."""
        if self.budget and not self.skipped:
            self.settle()
        self._asked.clear()

    def settle(self) -> float:
        """Settle the step and record what became of it; returns the rate that was taken."""
        with self._clock("measure"):
            self.taken = taken = self.budget.settle(self.measured_kl, self._nats)
        self.record({"budget/kl": taken.kl, "budget/nats": taken.nats, "budget/alpha": taken.alpha})
        self.record({"budget/passes": taken.passes, "budget/taken_back": float(taken.taken_back)})
        return taken.alpha

    @torch.no_grad()
    def measured_kl(self) -> float:
        """The KL of the policy before the step from that of the present parameters, over the tokens of all ranks."""
        totals = torch.zeros(2, dtype=torch.float64)
        for one in self._asked:
            with self.accelerator.autocast():
                now, _, _ = super()._get_per_token_logps_and_entropies(self.model, **one.arguments)
            kl = sampled_kl(one.log_probs, now, one.mask)
            totals += torch.tensor([kl.mean * kl.count if kl.count else 0.0, kl.count], dtype=torch.float64)
        reshard(self.model)
        total, count = sum_ranks(self.accelerator, totals).tolist()
        return total / max(1, count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the rate that was taken where there is no scheduled one."""
        if self.taken and self.budget.rule == "target" and "learning_rate" in logs:
            logs["learning_rate"] = self.taken.alpha
        super().log(logs, start_time)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _state(self):
        state, numbers = super()._state()
        return state, numbers | ({"budget": self.budget.state_dict()} if self.budget else {})

    def _load_state(self, state, numbers):
        super()._load_state(state, numbers)
        if self.budget:
            self.budget.load_state_dict(numbers["budget"])


POSITIONAL = ("attention_mask", "logits_to_keep")  # TRL gives these without their names


def token_mask(inputs: dict[str, Any]) -> Tensor:
    """(B, T) bool, the completion tokens of a micro-batch that take part in the loss."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask
