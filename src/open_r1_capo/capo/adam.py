"""Adam's arithmetic on rows of moments (§4.1): the inner loops of `AdamStep`, in torch.

`kernels.py` has the same two functions for a GPU; these are its oracle and its fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from open_r1_capo.capo.moments import MomentTable
from open_r1_capo.capo.segments import chunks, working_set

SMALLEST_DECAY = 1e-24  # a moment that decayed by more is nothing beside a gradient, and its inverse still a float32


@dataclass(frozen=True)
class AdamRule:
    """Adam's constants.

    Attributes:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: ε, added to the root of the bias-corrected second moment.
        decay_absent: whether the moments of a row decay in the steps that do not touch it.
    """

    beta1: float
    beta2: float
    eps: float
    decay_absent: bool

    def direction(self, first: Tensor, second: Tensor, step: int) -> Tensor:
        """P̂ / (√Q̂ + ε) of the moments as they stand after `step` steps; any shape."""
        root = second.sqrt().div_((1 - self.beta2**step) ** 0.5).add_(self.eps)
        return first.div(1 - self.beta1**step).div_(root)

    def blend(self, first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The moments (R, D) after `gradient` (R, D), in place of the two."""
        first.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        return first, second

    def current(
        self, table: MomentTable, row: Tensor, step: int, columns: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Copies of the moments of table rows (R,) as they stand after `step` steps: (R, columns) each."""
        first, second = (m[:, columns].index_select(0, row) for m in (table.first, table.second))
        if self.decay_absent:
            missed = (step - table.last_step[row])[:, None].to(first.dtype)
            first.mul_(self.beta1**missed)
            second.mul_(self.beta2**missed)
        return first, second

    def carried(self, table: MomentTable, row: Tensor, step: int) -> tuple[Tensor | float, Tensor | float]:
        """β₁ and β₂ to the power of the steps since the rows' moments were written, up to step `step` included."""
        if not self.decay_absent:
            return max(self.beta1, SMALLEST_DECAY), max(self.beta2, SMALLEST_DECAY)
        passed = (step - table.last_step[row]).to(table.first.dtype)
        return (self.beta1**passed).clamp_(min=SMALLEST_DECAY), (self.beta2**passed).clamp_(min=SMALLEST_DECAY)


def propose(  # noqa: PLR0917
    rule: AdamRule,
    table: MomentTable,
    row: Tensor,
    coefficient: Tensor,
    features: Tensor,
    step: int,
    scratch_bytes: int,
) -> Tensor:
    """The logit change z = D x of each token's own Adam step, if `coefficient · x` arrived as step number `step`.

    With the moments P and Q, carried to the step by the factors s₁ and s₂, and b = 1 - β^step,

        z = s₁/√s₂ · √b₂/b₁ · Σ_d x_d (P_d + c (1-β₁)/s₁ x_d) / (√(Q_d + c² (1-β₂)/s₂ x_d²) + ε √b₂/√s₂),

    so that all constants are folded into (N, K) factors and each of the N·K·D elements is touched by few operations.

    Args:
        rule: Adam's constants.
        table: the moments; only read.
        row: (N, K), table rows of the support.
        coefficient: (N, K), A v.
        features: x_ND.
        step: the step's number, from 1.
        scratch_bytes: bound of the temporary memory.

    Returns:
        (N, K), of the coefficient's dtype.
    """
    (n, k), d, dtype = row.shape, features.shape[1], coefficient.dtype
    carry1, carry2 = rule.carried(table, row, step)
    bias1, bias2 = 1 - rule.beta1**step, 1 - rule.beta2**step
    pull = coefficient * (1 - rule.beta1) / carry1
    push = coefficient.square() * (1 - rule.beta2) / carry2
    scale = carry1 / carry2**0.5 * (bias2**0.5 / bias1)
    eps = rule.eps * bias2**0.5 / carry2**0.5
    z = torch.empty_like(coefficient)
    per_token = 2 * k * d * coefficient.element_size()
    parts = list(chunks(n, per_token, working_set(features.device, scratch_bytes)))
    buffer = coefficient.new_empty(2, (parts[0].stop if parts else 0) * k, d)  # page faults cost more than the sums
    for part in parts:
        index, x = row[part].flatten(), features[part, None, :].to(dtype)
        numerator, root = (
            _gather(moment, index, out[: len(index)]).view(-1, k, d)
            for moment, out in zip((table.first, table.second), buffer, strict=True)
        )
        root.addcmul_(push[part, :, None], x.square()).sqrt_().add_(eps[part, :, None] if rule.decay_absent else eps)
        numerator.addcmul_(pull[part, :, None], x).div_(root)
        torch.bmm(x, numerator.transpose(1, 2), out=z[part, None, :])  # x on the left: ten times faster on a CPU
    return z.mul_(scale)


def update(
    rule: AdamRule, table: MomentTable, row: Tensor, gradient: Callable[[slice], Tensor], step: int, scratch_bytes: int
) -> None:
    """Step number `step` of the moments of table rows (R,), in place.

    Args:
        rule: Adam's constants.
        table: the moments.
        row: (R,) int64, distinct.
        gradient: gives the averaged gradient (r, D) of a slice of the rows.
        step: the step's number, from 1.
        scratch_bytes: bound of the temporary memory.
    """
    bytes_each = 4 * table.first.shape[1] * table.first.element_size()
    for part in chunks(len(row), bytes_each, working_set(row.device, scratch_bytes)):
        index = row[part]
        first, second = rule.blend(*rule.current(table, index, step - 1), gradient(part).to(table.first.dtype))
        table.first.index_copy_(0, index, first)
        table.second.index_copy_(0, index, second)
    table.last_step[row] = step


def _gather(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    if table.dtype == out.dtype:
        return torch.index_select(table, 0, index, out=out)
    return out.copy_(table.index_select(0, index))
