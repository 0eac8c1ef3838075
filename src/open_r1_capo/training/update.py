"""One optimizer step's tokens: what is kept of each micro-batch, how its weights are chosen and where they act.

Functions of their arguments alone, so that `trainer.py` can be read as the algorithm.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from open_r1_capo.capo import TokenBatch, TokenSelection, TrustRegion
from open_r1_capo.capo.last_layer import RowGradient, merge
from open_r1_capo.capo.rules import (
    action_log_prob,
    covariance,
    covariance_weight,
    gradient_norm,
    norm_weight,
    probability_weight,
)
from open_r1_capo.capo.selection import accept_all
from open_r1_capo.settings.capo import CAPOConfig


@dataclass(frozen=True)
class Part:
    """One micro-batch of the running update: its N tokens as the loss pass saw them, and where they came from.

    Attributes:
        tokens: the tokens that take part.
        selection: the rule's weights and reasons, which act on the gradient.
        log_mass: (N,), log of the policy's probability of each support.
        entropy: (N,), of the policy over the full vocabulary, in nats.
        input_ids: (B, L) int64, prompts and completions.
        attention_mask: (B, L).
        mask: (B, T) bool, the completion tokens that take part.
        rewards: (B,), of the completions, NaN where none could be given; None if unknown.
        high_entropy: (N,) bool, the tokens that TRL's loss keeps by itself (`top_entropy_quantile`); None for all.
    """

    tokens: TokenBatch
    selection: TokenSelection
    log_mass: Tensor
    entropy: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    rewards: Tensor | None = None
    high_entropy: Tensor | None = None

    @property
    def taken(self) -> TokenSelection:
        """The selection of what the step holds: without the tokens that TRL's loss leaves out."""
        return self.selection if self.high_entropy is None else self.selection.weighted(self.high_entropy)


def select(
    capo: CAPOConfig,
    tokens: TokenBatch,
    log_mass: Tensor,
    shifts: tuple[Tensor, Tensor],
    generator: torch.Generator | None = None,
) -> TokenSelection:
    """Judge a micro-batch's tokens by the configured rule.

    Args:
        capo: names the rule and holds its constants.
        tokens: N tokens.
        log_mass: (N,), log of the policy's probability of each support.
        shifts: m_F and m_H, (N,) each.
        generator: of the rule that draws.

    Returns:
        The weight of each token and the reason for it.
    """
    if capo.mode == "observe":
        return accept_all(*shifts)
    if capo.mode in ("mask", "scale"):
        return capo.trust_region().select(*shifts)
    log_prob = action_log_prob(tokens, log_mass)
    if capo.mode == "probability":
        weight = probability_weight(log_prob, capo.probability_alpha)
    elif capo.mode == "covariance":
        bounds = (capo.covariance_low, capo.covariance_high)
        weight = covariance_weight(covariance(log_prob, tokens.advantages), capo.covariance_frac, bounds, generator)
    else:
        weight = norm_weight(gradient_norm(tokens), capo.max_token_gradient)
    return TrustRegion(math.inf).select(*shifts).weighted(weight)


def draw(*numbers: int) -> torch.Generator:
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


def gradient_scale(part: Part, denominator: str, loss_type: str) -> Tensor:
    """What multiplies each log-probability's gradient: the weight, and n/Σw for the denominator `kept`.

    Args:
        part: a micro-batch.
        denominator: `kept` or `all`.
        loss_type: TRL's, which says over what it divides.

    Returns:
        (B, T).
    """
    weight = part.selection.weight
    scale = torch.ones(part.mask.shape, dtype=weight.dtype, device=weight.device).masked_scatter(part.mask, weight)
    if denominator == "kept" and loss_type != "dr_grpo":  # Dr.GRPO counts no tokens
        axis = (0, 1) if loss_type == "bnpo" else 1
        kept = (scale * part.mask).sum(axis, keepdim=True)
        scale = scale * torch.where(kept > 0, part.mask.sum(axis, keepdim=True) / kept, 0)
    return scale


def gather_columns(accelerator: Accelerator, columns: Tensor) -> Tensor:
    """(C, N) of every rank side by side, (C, ΣN); the first column is never negative, which tells the padding."""
    padded = accelerator.pad_across_processes(columns, dim=1, pad_index=-1.0)
    everyone = accelerator.gather(padded.T.contiguous()).T
    return everyone[:, everyone[0] >= 0]


def gather_selection(accelerator: Accelerator, parts: Sequence[Part]) -> tuple[TokenSelection, Tensor]:
    """The update's selection over all micro-batches and ranks.

    Args:
        accelerator: knows the ranks.
        parts: this rank's micro-batches.

    Returns:
        The selection of N tokens, in no particular order, and which of them have a gradient ((N,) bool, A ≠ 0).
    """
    selection = TokenSelection.cat([part.taken for part in parts])
    moving = torch.cat([part.tokens.advantages != 0 for part in parts])
    columns = torch.stack([column.float() for column in (*vars(selection).values(), moving)])
    weight, policy, objective, *flags, moving = gather_columns(accelerator, columns)
    return TokenSelection(weight, policy, objective, *(flag.bool() for flag in flags)), moving.bool()


def sum_rows(accelerator: Accelerator, mine: RowGradient) -> RowGradient:
    """Sum the gradient rows over the ranks: the union of the ids first, then one all-reduce of its rows."""
    if accelerator.num_processes == 1:
        return mine
    ids = accelerator.pad_across_processes(mine.token_ids, dim=0, pad_index=-1)
    union = torch.unique(accelerator.gather(ids))
    union = union[union >= 0]
    empty = RowGradient(
        union,
        mine.total.new_zeros(len(union), mine.total.shape[1]),
        mine.count.new_zeros(len(union)),
        torch.zeros_like(mine.tokens),
    )
    aligned = merge([empty, mine])
    reduced = [accelerator.reduce(x, "sum") for x in (aligned.total, aligned.count, aligned.tokens)]
    return RowGradient(union, *reduced)
