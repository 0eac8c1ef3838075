"""What a token rule returns: a weight per token, the reason for it, and the metrics of both (paper Eq. 11)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenSelection:
    """The outcome for N tokens."""

    weight: Tensor  # (N,) in [0, 1]; 0 leaves the token out
    policy_shift: Tensor  # (N,), the shift that was judged
    objective_shift: Tensor  # (N,), the shift that was judged
    over_policy: Tensor  # (N,) bool, m_F above its bound (`Mask` rejects it, `Scale` shortens it)
    over_objective: Tensor  # (N,) bool, m_H outside its bounds
    non_finite: Tensor  # (N,) bool, a shift is NaN or infinite; always rejected
    other: Tensor  # (N,) bool, a rule that is not Eq. 11's has lowered the weight

    @staticmethod
    def cat(parts: Sequence[TokenSelection]) -> TokenSelection:
        """The selections of several micro-batches, one after the other."""
        import torch  # here alone: see rules.py

        return TokenSelection(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenSelection)))

    def weighted(self, weight: Tensor) -> TokenSelection:
        """The selection with every weight multiplied by another rule's, (N,) in [0, 1]; NaN leaves its token out."""
        weight = weight.to(self.weight.dtype).nan_to_num(0)
        return replace(self, weight=self.weight * weight, other=self.other | (weight < 1))

    def metrics(self, moving: Tensor | None = None) -> dict[str, float]:
        """Shares of all N tokens that were rejected (and by which bound) or scaled, their mean weight, and the shifts.

        Of the finite shifts of the `moving` tokens ((N,) bool, A ≠ 0): mean, p99 and max (absolute for m_H).
        """
        rejected, total = self.weight == 0, max(1, len(self.weight))
        counts = {
            "rejected_frac": rejected,
            "rejected_frac_policy": rejected & self.over_policy,
            "rejected_frac_objective": rejected & self.over_objective,
            "rejected_frac_non_finite": rejected & self.non_finite,
            "rejected_frac_other": rejected & self.other,
            "scaled_frac": (self.weight > 0) & (self.weight < 1),
        }
        metrics = {name: float(flag.sum()) / total for name, flag in counts.items()}
        metrics["mean_weight"] = float(self.weight.sum()) / total
        seen = ~self.non_finite if moving is None else ~self.non_finite & moving
        for name in ("policy_shift", "objective_shift"):
            values = getattr(self, name)[seen].float()
            metrics |= {f"{name}/{key}": value for key, value in _summary(values).items()}
        return metrics


def _summary(values: Tensor) -> dict[str, float]:
    if len(values) == 0:
        return {"mean": 0.0, "p99": 0.0, "max": 0.0}
    size = values.abs()
    p99 = size.kthvalue(max(1, math.ceil(0.99 * len(size)))).values
    return {"mean": float(values.mean()), "p99": float(p99), "max": float(size.max())}
