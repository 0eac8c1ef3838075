"""What an update really did to its own tokens: measured after the step, against what was predicted before it.

One forward pass of the backbone; the last layer's own share costs one more pass through the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from open_r1_capo.capo.curvature import objective_change, support_kl
from open_r1_capo.training.features import completion_hidden_states, head_output, support_log_probs
from open_r1_capo.training.ranks import gather_columns, sum_ranks
from open_r1_capo.training.update import MicroBatch


@dataclass(frozen=True)
class Measured:
    """The step at M of a micro-batch's N tokens.

    Attributes:
        chosen: (N,) bool, the tokens that were measured.
        kl: (M,) float64, KL(π_old ‖ π_new) in nats.
        kl_head: (M,) float64, the same with the new LM head on the old hidden states: what the last layer alone did.
        objective: (M,) float64, A (π_new(a) / π_old(a) - 1), the change of the surrogate objective.
        log_prob: (M,) float32, log π_new(a).
    """

    chosen: Tensor
    kl: Tensor
    kl_head: Tensor
    objective: Tensor
    log_prob: Tensor


def measure(
    policy: PreTrainedModel,
    micro_batch: MicroBatch,
    share: float,
    temperature: float,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Measured:
    """Measure a step that was taken, on a micro-batch as it was before it, or on a `share` in (0, 1] of its sequences.

    TRL has shuffled the sequences, so the first ones are a random part. `policy` is the model after the step, without
    wrappers; `temperature` τ divides the logits.
    """
    count = max(1, round(share * len(micro_batch.mask)))
    chosen = torch.zeros_like(micro_batch.mask)
    chosen[:count] = True
    chosen &= micro_batch.mask
    rows = chosen[micro_batch.mask]
    tokens, log_mass = micro_batch.tokens.select(rows), micro_batch.log_mass[rows]
    sequences = (x[:count] for x in (micro_batch.input_ids, micro_batch.attention_mask, chosen))
    with autocast():
        hidden = completion_hidden_states(policy, *sequences, share_prompts=micro_batch.share_prompts)
    new = support_log_probs(policy, hidden, tokens.token_ids, temperature)
    x = tokens.features if micro_batch.head_features is None else micro_batch.head_features[rows]
    old = head_output(x, temperature, hidden.shape[1])
    head = support_log_probs(policy, old, tokens.token_ids, temperature)
    return Measured(
        rows,
        support_kl(tokens, log_mass, new),
        support_kl(tokens, log_mass, head),
        objective_change(tokens, log_mass, new),
        new.gather(1, tokens.action_index[:, None])[:, 0],
    )


def metrics(
    accelerator: Accelerator, micro_batches: Sequence[MicroBatch], found: Sequence[Measured]
) -> dict[str, float]:
    """Means over the measured tokens of all ranks, and how well m_F ranks them.

    `measured_kl`, `measured_kl_head` and `measured_objective` are means over the finite measurements (NaN if none is,
    0 without a token), `measured_non_finite` is the share of the KLs that are not, and `kl_spearman` the rank
    correlation of m_F with the measured KL over the tokens with a gradient (left out where it is not defined).
    """
    totals = torch.zeros(3, 3, dtype=torch.float64)  # sum and count of each mean, and the count of all tokens
    for one in found:
        values = torch.stack([one.kl, one.kl_head, one.objective])
        finite = values.isfinite()
        counts = torch.stack([finite, torch.ones_like(finite)]).sum(2)
        totals += torch.stack([values.where(finite, 0).sum(1), *counts], 1).cpu()
    totals = sum_ranks(accelerator, totals)
    means = (totals[:, 0] / totals[:, 1].where(totals[:, 2] > 0, 1)).tolist()
    logs = dict(zip(("measured_kl", "measured_kl_head", "measured_objective"), means, strict=True))
    logs["measured_non_finite"] = float(1 - totals[0, 1] / totals[0, 2].clamp(min=1))
    pairs = [_pairs(*pair) for pair in zip(micro_batches, found, strict=True)]
    correlation = spearman(*gather_columns(accelerator, torch.cat(pairs, 1)))
    return logs if correlation is None else logs | {"kl_spearman": correlation}


def _pairs(micro_batch: MicroBatch, one: Measured) -> Tensor:
    """(2, n) float32, measured KL and m_F of the tokens with a gradient."""
    pairs = torch.stack([one.kl.float(), micro_batch.by_rule.policy_shift[one.chosen].float()])
    moving = micro_batch.tokens.advantages[one.chosen] != 0
    return pairs[:, moving & pairs.isfinite().all(0)]


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of (N,) and (N,), ties sharing their mean rank; None where it is not defined."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1)
    return float(ranks[0] @ ranks[1] / norms.prod()) if len(a) > 1 and norms.min() > 0 else None


def _ranks(values: Tensor) -> Tensor:
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]
