"""Which tokens take part in the step (paper Eq. 11), as a weight per token and the reason for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSelection:
    """The outcome for N tokens.

    Attributes:
        weight: (N,) in [0, 1]; 0 leaves the token out.
        policy_shift: (N,), the shift that was judged.
        objective_shift: (N,), the shift that was judged.
        over_policy: (N,) bool, m_F above its bound (rejected by `mask`, scaled by `scale`).
        over_objective: (N,) bool, m_H outside its bounds.
        non_finite: (N,) bool, a shift is NaN or infinite; always rejected.
        other: (N,) bool, a rule that is not Eq. 11's has lowered the weight.
    """

    weight: Tensor
    policy_shift: Tensor
    objective_shift: Tensor
    over_policy: Tensor
    over_objective: Tensor
    non_finite: Tensor
    other: Tensor

    @staticmethod
    def cat(parts: Sequence[TokenSelection]) -> TokenSelection:
        """The selections of several micro-batches, one after the other."""
        return TokenSelection(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenSelection)))

    def weighted(self, weight: Tensor) -> TokenSelection:
        """The selection with every weight multiplied by another rule's, (N,) in [0, 1]; NaN leaves its token out."""
        weight = weight.to(self.weight.dtype).nan_to_num(0)
        return replace(self, weight=self.weight * weight, other=self.other | (weight < 1))

    def metrics(self, moving: Tensor | None = None) -> dict[str, float]:
        """What to log of a selection.

        Args:
            moving: (N,) bool, the tokens with a gradient (A ≠ 0), over which the shifts are summarised.

        Returns:
            Fractions of all N tokens that were rejected (and by which bound) or scaled down, their mean weight, and
            mean, p99 and max of the finite shifts (for the objective: p99 and max of the absolute value).
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


@dataclass(frozen=True)
class TrustRegion:
    """The bounds of Eq. 11.

    Attributes:
        max_policy_shift: δ_F, m_F ≤ δ_F; inf turns the bound off.
        max_objective_shift: δ_H^high, the upper bound on m_H; inf turns the bound off.
        min_objective_shift: δ_H, m_H ≥ δ_H; None is the symmetric form -δ_H < m_H < δ_H of App. J.
        mode: `mask` rejects a token over δ_F; `scale` weighs it by min(1, √(δ_F / m_F)), under SGD the largest weight
            that keeps the token's own step inside. Adam's step is not linear in the gradient: there the weighted
            token's step stays longer than δ_F allows. Both reject what the objective bounds reject.

    Raises:
        ValueError: a bound that is not positive or not above the lower one, or an unknown mode.
    """

    max_policy_shift: float
    max_objective_shift: float = math.inf
    min_objective_shift: float | None = None
    mode: str = "mask"

    def __post_init__(self):
        """Check the bounds.

        Raises:
            ValueError: a bound or the mode is invalid.
        """
        for name in ("max_policy_shift", "max_objective_shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0 (inf turns it off), got {getattr(self, name)}")
        low = self.min_objective_shift
        if low is not None and not low < self.max_objective_shift:
            raise ValueError(f"min_objective_shift must be below max_objective_shift, got {low}")
        if self.mode not in ("mask", "scale"):
            raise ValueError(f"mode must be 'mask' or 'scale', got {self.mode!r}")

    def select(self, policy_shift: Tensor, objective_shift: Tensor) -> TokenSelection:
        """Judge N tokens.

        Args:
            policy_shift: (N,), m_F.
            objective_shift: (N,), m_H.

        Returns:
            The weight of each token and which bound it broke.
        """
        non_finite = ~(policy_shift.isfinite() & objective_shift.isfinite())
        over_policy = ~non_finite & (policy_shift > self.max_policy_shift)
        over_objective = ~non_finite & ~self._objective_inside(objective_shift)
        if self.mode == "scale":
            inside = (self.max_policy_shift / policy_shift).sqrt().clamp(max=1)
            weight = torch.where(over_policy, inside, torch.ones_like(policy_shift))
        else:
            weight = (~over_policy).to(policy_shift.dtype)
        weight = weight.masked_fill(over_objective | non_finite, 0)
        none = torch.zeros_like(non_finite)
        return TokenSelection(weight, policy_shift, objective_shift, over_policy, over_objective, non_finite, none)

    def _objective_inside(self, shift: Tensor) -> Tensor:
        if self.min_objective_shift is None:
            return shift.abs() < self.max_objective_shift
        return (shift >= self.min_objective_shift) & (shift <= self.max_objective_shift)


def accept_all(policy_shift: Tensor, objective_shift: Tensor) -> TokenSelection:
    """The selection of an observer: every token has weight 1, whatever its shifts ((N,) each)."""
    selection = TrustRegion(math.inf).select(policy_shift, objective_shift)
    return TokenSelection(torch.ones_like(policy_shift), *(getattr(selection, f.name) for f in fields(selection)[1:]))


def _summary(values: Tensor) -> dict[str, float]:
    if len(values) == 0:
        return {"mean": 0.0, "p99": 0.0, "max": 0.0}
    size = values.abs()
    p99 = size.kthvalue(max(1, math.ceil(0.99 * len(size)))).values
    return {"mean": float(values.mean()), "p99": float(p99), "max": float(size.max())}
