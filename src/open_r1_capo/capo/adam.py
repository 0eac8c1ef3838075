"""Adam's arithmetic on rows of moments (§4.1) in torch: the oracle of the faster engines, and what runs without them.

Three functions make an engine (`engines/`): `propose`, `commit` and `planned`. They share their arguments: `rule`,
Adam's constants; `table`, the moments, which only `commit` changes; `batch` of N tokens; `step`, the number of the
step that is proposed or committed (from 1), or the number of steps taken; `scratch`, a bound in bytes of the temporary
memory that has the width D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from open_r1_capo.capo.last_layer import TokenBatch, row_entries
from open_r1_capo.capo.moments import MomentTable
from open_r1_capo.capo.segments import chunks, support_dots, working_set

SMALLEST_DECAY = 1e-24  # moments that decayed further are negligible, and 1 / decay must not overflow float32


@dataclass(frozen=True)
class AdamRule:
    """Adam's constants, and the averages they are used with."""

    beta1: float  # decay of the first moment
    beta2: float  # decay of the second moment
    eps: float  # ε, added to the root of the bias-corrected second moment
    moment_average: str  # `per_logit` or `per_token`
    absent_rows: str  # `hold` or `decay`

    def direction(self, first: Tensor, second: Tensor, step: int) -> Tensor:
        """P̂ / (√Q̂ + ε) of the moments as they stand after `step` steps; any shape."""
        root = second.sqrt().div_((1 - self.beta2**step) ** 0.5).add_(self.eps)
        return first.div(1 - self.beta1**step).div_(root)

    def blend(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The moments (R, D) after `gradient` (R, D), in place of the two."""
        first.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        return first, second

    def decays(self, table: MomentTable, row: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What the stored moments of `row` (…) have decayed by after `step` steps: two factors, (…) or ()."""
        if self.absent_rows == "hold":
            one = table.first.new_ones(())
            return one, one
        passed = (step - table.last_step[row]).to(table.first.dtype)
        return self.beta1**passed, self.beta2**passed

    def current(
        self, table: MomentTable, row: Tensor, step: int, columns: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Copies of the moments of table rows (R,) as they stand after `step` steps: (R, columns) each."""
        first, second = (m[:, columns].index_select(0, row) for m in (table.first, table.second))
        if self.absent_rows == "decay":
            decay1, decay2 = self.decays(table, row, step)
            first.mul_(decay1[:, None])
            second.mul_(decay2[:, None])
        return first, second


class Folded(NamedTuple):
    """A proposal with its constants folded into (N, K) factors, for moments P and Q as they are stored.

    z = scale · Σ_d x_d (P_d + pull · x_d) / (√(Q_d + push · x_d²) + eps)
    """

    pull: Tensor
    push: Tensor
    eps: Tensor
    scale: Tensor


def fold(rule: AdamRule, table: MomentTable, row: Tensor, coefficient: Tensor, step: int) -> Folded:
    """The factors of the steps that `coefficient · x` (N, K) would take as step number `step` of rows (N, K)."""
    decay1, decay2 = (decay.to(coefficient.dtype) for decay in rule.decays(table, row, step - 1))
    carry1 = (decay1 * rule.beta1).clamp_(min=SMALLEST_DECAY)
    carry2 = (decay2 * rule.beta2).clamp_(min=SMALLEST_DECAY)
    root = (1 - rule.beta2**step) ** 0.5 / carry2.sqrt()
    return Folded(
        pull=coefficient * ((1 - rule.beta1) / carry1),
        push=coefficient.square().mul_((1 - rule.beta2) / carry2),
        eps=(rule.eps * root).expand(row.shape),
        scale=carry1 * root / (1 - rule.beta1**step),
    )


def propose(rule: AdamRule, table: MomentTable, batch: TokenBatch, step: int, scratch: int) -> Tensor:
    """(N, K), the logit change z = D x of each token's own step, if its gradient arrived as step number `step`."""
    (n, k), d = batch.token_ids.shape, batch.features.shape[1]
    row = table.row_of[batch.token_ids]
    folded = fold(rule, table, row, batch.coefficient, step)
    z = torch.empty_like(folded.pull)
    parts = list(chunks(n, 2 * k * d * z.element_size(), working_set(z.device, scratch)))
    buffer = z.new_empty(2, (parts[0].stop if parts else 0) * k, d)  # new pages would cost more than the arithmetic
    for part in parts:
        pull, push, eps = (factor[part, :, None] for factor in folded[:3])
        index, x = row[part].flatten(), batch.features[part, None, :].to(z.dtype)
        numerator, root = (
            _gather(moment, index, out[: len(index)]).view(-1, k, d)
            for moment, out in zip((table.first, table.second), buffer, strict=True)
        )
        numerator.addcmul_(pull, x).div_(root.addcmul_(push, x.square()).sqrt_().add_(eps))
        torch.bmm(x, numerator.transpose(1, 2), out=z[part, None, :])  # x on the left: ten times faster on a CPU
    return z.mul_(folded.scale)


def commit(rule: AdamRule, table: MomentTable, batch: TokenBatch, weight: Tensor, step: int, scratch: int) -> None:
    """Step the moments with one batch's gradient of weights (N,), without ever holding all of its rows."""
    entries = row_entries(batch, weight)
    row = table.grow(entries.token_ids)
    features = batch.features
    update(rule, table, row, lambda rows: entries.mean(rule.moment_average, rows, features, scratch), step, scratch)


def planned(rule: AdamRule, table: MomentTable, batch: TokenBatch, step: int, scratch: int) -> Tensor:
    """(N, K), z of the step that the moments take after `step` steps; 0 for rows that it leaves where they are."""
    used, place = torch.unique(table.row_of[batch.token_ids], return_inverse=True)
    used = used.long()
    z = table.first.new_zeros(place.shape)
    for columns in chunks(batch.features.shape[1], 5 * len(used) * z.element_size(), scratch):
        direction = rule.direction(*rule.current(table, used, step, columns), step)
        direction[resting(rule, table, used, step)] = 0
        z += support_dots(direction, place, batch.features[:, columns], scratch)
    return z


def resting(rule: AdamRule, table: MomentTable, row: Tensor, step: int) -> Tensor:
    """Which of the rows step number `step` left where they are: under `hold`, those it did not touch."""
    return (table.last_step[row] != step) & (rule.absent_rows == "hold")


def update(
    rule: AdamRule, table: MomentTable, row: Tensor, gradient: Callable[[slice], Tensor], step: int, scratch: int
) -> None:
    """Step the moments of distinct table rows (R,); `gradient` gives the averaged gradient (r, D) of a slice."""
    bytes_each = 4 * table.first.shape[1] * table.first.element_size()
    for part in chunks(len(row), bytes_each, working_set(row.device, scratch)):
        index = row[part]
        first, second = rule.blend(*rule.current(table, index, step - 1), gradient(part).to(table.first.dtype))
        table.first.index_copy_(0, index, first)
        table.second.index_copy_(0, index, second)
    table.last_step[row] = step


def _gather(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    if table.dtype == out.dtype:
        return torch.index_select(table, 0, index, out=out)
    return out.copy_(table.index_select(0, index))
