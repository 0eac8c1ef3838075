"""One update (optimizer step) in the making: its micro-batches, and where their weights act."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from open_r1_capo.capo import TokenBatch, TokenSelection


@dataclass(frozen=True)
class MicroBatch:
    """The N tokens of one forward pass as the loss saw them, and where they came from.

    Attributes:
        tokens: the tokens that take part.
        by_rule: the token rule's weights and reasons, which act on the gradient.
        log_mass: (N,), log of the policy's probability of each support.
        entropy: (N,), of the policy over the full vocabulary, in nats.
        input_ids: (B, L) int64, prompts and completions.
        attention_mask: (B, L).
        mask: (B, T) bool, the completion tokens that take part.
        rewards: (B,), of the completions, NaN where none could be given; None if unknown.
        high_entropy: (N,) bool, the tokens that TRL's loss keeps by itself (`top_entropy_quantile`); None for all.
        share_prompts: the forward pass was packed (`training/packing.py`), and so is one that measures it.
        head_features: (N, D), x of the LM head, where the step model is given others (`capo.hidden_states`), or None.
    """

    tokens: TokenBatch
    by_rule: TokenSelection
    log_mass: Tensor
    entropy: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    rewards: Tensor | None = None
    high_entropy: Tensor | None = None
    share_prompts: bool = False
    head_features: Tensor | None = None

    @property
    def in_step(self) -> TokenSelection:
        """What the step is made of: the rule's selection without the tokens that TRL's loss leaves out by itself."""
        return self.by_rule if self.high_entropy is None else self.by_rule.weighted(self.high_entropy)


@dataclass
class Update:
    """What is known of the coming optimizer step, from its first micro-batch until it has been taken.

    Attributes:
        micro_batches: of this rank.
        scheduled_lrs: rates of the optimizer's parameter groups before a step rule shortened them.
        rate: α of the predicted shifts, before a step rule shortened it.
        planned_kl: m_F(batch) at the rate that the step is taken with, in nats.
        gradient_norm: before clipping.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    scheduled_lrs: list[float] = field(default_factory=list)
    rate: float = 0.0
    planned_kl: float = 0.0
    gradient_norm: float = 0.0


def step_generator(*numbers: int) -> torch.Generator:
    """A generator that depends on the numbers alone (seed, step, …): a resumed run draws what it would have drawn."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def subsets(inputs: dict[str, Any], mask: Tensor, granularity: str) -> Tensor | None:
    """(N,) int64, each token's sequence or prompt within the micro-batch, if the granularity asks for it."""
    rows = torch.arange(len(mask), device=mask.device)
    if granularity == "group":  # TRL shuffles a batch's sequences; equal prompts make a group
        rows = torch.unique(inputs["prompt_ids"], dim=0, return_inverse=True)[1]
    elif granularity != "sequence":
        return None
    return rows[:, None].expand(mask.shape)[mask]


def gradient_scale(micro_batch: MicroBatch, denominator: str, loss_type: str) -> Tensor:
    """(B, T), what multiplies each log-probability's gradient: the weight, and n/Σw for the denominator `kept`.

    TRL's `loss_type` says over what the loss divides.
    """
    weight, mask = micro_batch.by_rule.weight, micro_batch.mask
    scale = torch.ones(mask.shape, dtype=weight.dtype, device=weight.device).masked_scatter(mask, weight)
    if denominator == "kept" and loss_type != "dr_grpo":  # Dr.GRPO counts no tokens
        axis = (0, 1) if loss_type == "bnpo" else 1
        kept = (scale * mask).sum(axis, keepdim=True)
        scale = scale * torch.where(kept > 0, mask.sum(axis, keepdim=True) / kept, 0)
    return scale
