"""A KL budget for anybody's TRL trainer, in one line.

    trainer = GRPOTrainer(model, reward_funcs, args, train_dataset)
    trainer.add_callback(KLBudgetCallback(nats=1e-3))
    trainer.train()

Whatever the loss is, TRL's policy-gradient trainers ask the model for the log-probabilities of the sampled tokens. The
callback keeps what the model was asked in each backward pass, and after the optimizer's step asks the same again: the
KL of the step is estimated from the two (`sampled_kl`), and the step is moved until it fits (`KLBudget`). Works with
LoRA, gradient accumulation and clipping, reused batches, DDP and FSDP 2; not with DeepSpeed, which steps inside
backward.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback

from open_r1_capo.budget import KLBudget, Schedule, Taken, sampled_kl
from open_r1_capo.runs.run import write_atomically
from open_r1_capo.training.features import check_dropout, reshard

logger = logging.getLogger(__name__)
STATE = "kl_budget.json"  # in each checkpoint folder


@dataclass
class _Asked:
    """One training forward pass: what the model was asked, and what it answered."""

    inputs: dict[str, Any]
    log_probs: Tensor
    mask: Tensor
    entropy: float
    autocast: tuple[str, torch.dtype] | None


class KLBudgetCallback(TrainerCallback):
    """Keeps each optimizer step of a TRL trainer within a budget of KL.

    Args:
        nats: mean KL(π_old ‖ π_now) a token of a step, in nats.
        entropy_share: instead of `nats`: the budget as a share of the policy's entropy on the step's tokens.
        rule: `target` (the trainer's learning rate and its schedule are not used) or `verify` (its upper end).
        share: of each micro-batch's sequences that are measured, in (0, 1].
        schedule: shape of the budget over the training: `constant`, `linear` or `cosine2`.
        **options: of `KLBudget`: `tolerance`, `max_passes`, `copy_bytes`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        nats: float | None = None,
        *,
        entropy_share: float | None = None,
        rule: str = "target",
        share: float = 1.0,
        schedule: str = "constant",
        **options: Any,
    ):
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        Schedule(schedule, total_steps=1)
        self.options = {"nats": nats, "entropy_share": entropy_share, "rule": rule, **options}
        KLBudget(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), **self.options)  # checks them
        self.share, self.shape = share, schedule
        self.budget: KLBudget | None = None
        self.taken: Taken | None = None
        self._asked: list[_Asked] = []
        self._model: Any = None
        self._hook: Any = None
        self._nats = 0.0

    # --- what the model is asked -------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Watch the model, and take over the optimizer's steps.

        Raises:
            ValueError: the optimizer's step cannot be pulled back, or another callback has taken over.
        """
        if self._hook is not None or getattr(optimizer, "kl_budget", None) not in (None, self):
            raise ValueError("this trainer has a KLBudgetCallback already: add it once")
        check_dropout(model)
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError("a KL budget cannot move the flat shards of FSDP 1: set fsdp_version: 2")
        optimizer.kl_budget = self
        self.budget = KLBudget(optimizer, schedule=Schedule(self.shape, state.max_steps), **self.options)
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if saved.is_file() and state.global_step:
            self.budget.load_state_dict(json.loads(saved.read_text()))
        elif state.global_step:
            logger.warning("KLBudgetCallback: %s is missing, so the budget starts anew", saved)
        if self.options["rule"] == "target":
            logger.warning("KLBudgetCallback(rule='target'): learning_rate and its schedule are not used")
        self._model = model
        self._hook = model.register_forward_hook(self._keep, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the model as it was."""
        self._hook.remove()
        self._hook = None

    def _keep(self, model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        log_probs = getattr(output, "log_probs", None)
        if log_probs is None or not torch.is_grad_enabled() or not model.training:
            return
        rows = max(1, round(self.share * len(log_probs)))
        inputs = {
            name: value[:rows] if isinstance(value, Tensor) and len(value) == len(log_probs) else value
            for name, value in kwargs.items()
        }
        mask, device = output.label_mask[:rows], log_probs.device.type
        entropy = getattr(output, "entropy", None)
        mean = float("nan") if entropy is None else float(entropy[:rows][mask].detach().mean())
        precision = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        self._asked.append(_Asked(inputs, log_probs[:rows].detach(), mask, mean, precision))

    # --- the step ----------------------------------------------------------------------------------------------------

    def on_step_begin(self, args, state, control, **kwargs):
        """Forget what was asked for the step before."""
        self._asked.clear()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Set the rate of the coming step; throw away a gradient that is not finite."""
        if not self._asked:
            raise ValueError(
                "KLBudgetCallback saw no log-probabilities in the backward pass: it works with TRL's trainers that "
                "ask the model for them (GRPOTrainer, RLOOTrainer)"
            )
        entropy = _over_ranks([(one.entropy, int(one.mask.sum())) for one in self._asked])
        self._nats = self.budget.budget(entropy=entropy)
        if not self.budget.begin(self._nats):
            for parameter in self._model.parameters():
                parameter.grad = None

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Measure the step, and move along it until its KL fits."""
        self.taken = self.budget.settle(self._measure, self._nats)
        self._asked.clear()

    @torch.no_grad()
    def _measure(self) -> float:
        with _evaluating(self._model):
            found = []
            for one in self._asked:
                device, dtype = one.autocast or (one.log_probs.device.type, None)
                with torch.autocast(device, dtype=dtype, enabled=one.autocast is not None):
                    now = self._model(**one.inputs).log_probs
                kl = sampled_kl(one.log_probs, now, one.mask)
                found.append((kl.mean, kl.count))
        reshard(self._model)
        return _over_ranks(found)

    # --- logs and checkpoints ----------------------------------------------------------------------------------------

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add `budget/kl`, `budget/nats`, `budget/alpha`, `budget/passes` and `budget/taken_back` to the log."""
        if self.taken is None or not logs or "loss" not in logs:
            return
        values = {"kl": self.taken.kl, "nats": self.taken.nats, "alpha": self.taken.alpha}
        values |= {"passes": self.taken.passes, "taken_back": float(self.taken.taken_back)}
        for target in (logs, state.log_history[-1] if state.log_history else {}):
            target.update({f"budget/{name}": value for name, value in values.items()})

    def on_save(self, args, state, control, **kwargs):
        """Keep what the next step needs beside the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_atomically(folder / STATE, json.dumps(self.budget.state_dict()))


def _over_ranks(parts: list[tuple[float, int]]) -> float:
    """The mean over all tokens of all ranks, from means and counts; NaN without a token."""
    parts = [(mean, count) for mean, count in parts if count]
    total = torch.tensor([sum(mean * count for mean, count in parts), sum(c for _, c in parts)], dtype=torch.float64)
    if dist.is_available() and dist.is_initialized():
        total = total.float().to("cuda") if dist.get_backend() == "nccl" else total
        dist.all_reduce(total)
    return float(total[0] / total[1]) if total[1] else float("nan")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
