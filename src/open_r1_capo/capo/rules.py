"""Token rules: the weight of each token's gradient, and why.

| rule (`capo.mode`) | weight of a token | source |
|---|---|---|
| `observe` | 1: shifts are logged, nothing changes | |
| `mask` | 0 outside the bounds on m_F and m_H | Eq. 11 |
| `scale` | √(δ_F / m_F) above δ_F; 0 outside the bounds on m_H | ours |
| `improbable` | 0 for the least probable tokens, as many as `mask` would leave out | ours |
| `probability` | α π(a) + 1 - α: advantage reweighting (AR) | arXiv 2505.12929 |
| `covariance` | 0 for a few random tokens of large Cov(log π, A): Clip-Cov | arXiv 2505.22617 |
| `gradient_norm` | min(1, c / ‖g‖): clipping, token by token | after arXiv 1211.5063 |

The last three are rivals that act in CAPO's own regime, one update a batch, where every probability ratio is 1 and
clipped ratios change nothing. `improbable` asks whether the mask's curvature matters: under the Adam model m_F is
nearly a monotone function of 1 - π(a) (docs/deviations.md).

A rule is a dataclass whose fields are its settings, named as in the group `capo` of a recipe. To add one: write its
class, name it in `RULES`, and give it a file in `recipes/rule/`. torch is imported where it is used, so that settings
read a rule's fields without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from open_r1_capo.capo.last_layer import TokenBatch
    from open_r1_capo.capo.selection import TokenSelection


@dataclass(frozen=True)
class TokenRule:
    """Weigh every token 1 and log its shifts.

    Attributes:
        name: what `capo.mode` calls the rule.
        weighs: whether the rule can change a gradient.
        asks_head: whether its weights follow from the last layer's step or gradient, which must then be trained.
    """

    name: ClassVar[str] = "observe"
    weighs: ClassVar[bool] = False
    asks_head: ClassVar[bool] = False

    def select(
        self,
        tokens: TokenBatch,
        log_mass: Tensor,
        shifts: tuple[Tensor, Tensor],
        generator: torch.Generator | None = None,
    ) -> TokenSelection:
        """Weigh the N tokens of one micro-batch.

        `log_mass` (N,) is the log of the policy's probability of each support, `shifts` are m_F and m_H, (N,) each;
        `generator`, on the CPU, is for a rule that draws.
        """
        judged = observed(*shifts)
        return replace(judged, weight=judged.weight.new_ones(judged.weight.shape))


@dataclass(frozen=True)
class Mask(TokenRule):
    """Leave out the tokens outside the trust region of Eq. 11.

    Attributes:
        max_policy_shift: δ_F, m_F ≤ δ_F; inf turns the bound off.
        max_objective_shift: δ_H^high, the upper bound on m_H; inf turns the bound off.
        min_objective_shift: δ_H, m_H ≥ δ_H; None is the symmetric form -δ_H < m_H < δ_H of App. J.

    Raises:
        ValueError: a bound that is not positive, or not above the lower one.
    """

    name: ClassVar[str] = "mask"
    weighs: ClassVar[bool] = True
    asks_head: ClassVar[bool] = True
    max_policy_shift: float = math.inf
    max_objective_shift: float = math.inf
    min_objective_shift: float | None = None

    def __post_init__(self):
        """Check the bounds."""
        for key in ("max_policy_shift", "max_objective_shift"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be greater than 0 (inf turns it off), got {getattr(self, key)}")
        low = self.min_objective_shift
        if low is not None and not low < self.max_objective_shift:
            raise ValueError(f"min_objective_shift must be below max_objective_shift, got {low}")

    def judge(self, policy_shift: Tensor, objective_shift: Tensor) -> TokenSelection:
        """Judge N tokens by their shifts alone, (N,) each."""
        judged = observed(policy_shift, objective_shift, self.max_policy_shift)
        over_objective = ~judged.non_finite & ~self._objective_inside(objective_shift)
        weight = self._weight(judged).masked_fill(over_objective | judged.non_finite, 0)
        return replace(judged, weight=weight, over_objective=over_objective)

    def select(self, tokens, log_mass, shifts, generator=None) -> TokenSelection:
        """As `TokenRule.select`."""
        return self.judge(*shifts)

    def _weight(self, judged: TokenSelection) -> Tensor:
        return (~judged.over_policy).to(judged.policy_shift.dtype)

    def _objective_inside(self, shift: Tensor) -> Tensor:
        if self.min_objective_shift is None:
            return shift.abs() < self.max_objective_shift
        return (shift >= self.min_objective_shift) & (shift <= self.max_objective_shift)


@dataclass(frozen=True)
class Scale(Mask):
    """Shorten the tokens above δ_F instead of leaving them out; the bounds on m_H reject as in `Mask`.

    Under SGD, √(δ_F / m_F) is the largest weight that keeps a token's own step inside. Adam's step is not linear in
    the gradient: there the weighted token's step stays longer than δ_F allows.
    """

    name: ClassVar[str] = "scale"

    def _weight(self, judged: TokenSelection) -> Tensor:
        inside = (self.max_policy_shift / judged.policy_shift).sqrt().clamp(max=1)
        return inside.where(judged.over_policy, inside.new_ones(()))


@dataclass(frozen=True)
class Improbable(Mask):
    """Leave out as many tokens of a micro-batch as `Mask` would, but those of the smallest π(a).

    Its settings are the mask's; tokens of A = 0, which a mask never leaves out, are never chosen either. What differs
    from a run with the mask is which tokens are left out, and nothing else.
    """

    name: ClassVar[str] = "improbable"

    def select(self, tokens, log_mass, shifts, generator=None) -> TokenSelection:
        """As `TokenRule.select`."""
        judged = self.judge(*shifts)
        count = int(((judged.weight == 0) & ~judged.non_finite).sum())
        log_prob = tokens.action_log_prob(log_mass)
        candidates = ((tokens.advantages != 0) & ~judged.non_finite).nonzero()[:, 0]
        least = candidates[log_prob[candidates].argsort(stable=True)[:count]]
        return observed(*shifts).weighted(judged.weight.new_ones(len(judged.weight)).index_fill(0, least, 0))


class Rival(TokenRule, ABC):
    """A rule that weighs by something else than the shifts; they are logged, and one that is not finite rejects."""

    weighs: ClassVar[bool] = True

    def select(self, tokens, log_mass, shifts, generator=None) -> TokenSelection:
        """As `TokenRule.select`."""
        return observed(*shifts).weighted(self.weight(tokens, log_mass, generator))

    @abstractmethod
    def weight(self, tokens: TokenBatch, log_mass: Tensor, generator: torch.Generator | None) -> Tensor:
        """(N,) in [0, 1]; NaN leaves its token out."""


@dataclass(frozen=True)
class Probability(Rival):
    """Advantage reweighting: unlikely tokens count less, w = α π(a) + 1 - α in [1 - α, 1].

    Attributes:
        probability_alpha: α in [0, 1]; 0 is off, the authors use 0.3.
    """

    name: ClassVar[str] = "probability"
    probability_alpha: float = 0.3

    def __post_init__(self):
        """Check the range."""
        _is_share(self, "probability_alpha")

    def weight(self, tokens, log_mass, generator) -> Tensor:
        """As `Rival.weight`."""
        alpha = self.probability_alpha
        return alpha * tokens.action_log_prob(log_mass).exp() + (1 - alpha)


@dataclass(frozen=True)
class Covariance(Rival):
    """Clip-Cov: leave a few random tokens out among those with a large share of Cov(log π, A).

    Attributes:
        covariance_frac: r; max(1, ⌊r N⌋) tokens of a micro-batch are left out if there are as many candidates, as in
            the authors' code; 0 is off.
        covariance_low: only tokens with low < cov < high are candidates.
        covariance_high: see covariance_low.
    """

    name: ClassVar[str] = "covariance"
    covariance_frac: float = 2e-4
    covariance_low: float = 1.0
    covariance_high: float = 5.0

    def __post_init__(self):
        """Check the ranges."""
        _is_share(self, "covariance_frac")
        if not self.covariance_low < self.covariance_high:
            raise ValueError(
                f"covariance_low must be below covariance_high ({self.covariance_high}), got {self.covariance_low}"
            )

    def weight(self, tokens, log_mass, generator) -> Tensor:
        """As `Rival.weight`: 0 or 1."""
        return self.leave_out(covariance(tokens.action_log_prob(log_mass), tokens.advantages), generator)

    def leave_out(self, cov: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(N,), 0 for the tokens that are left out given their covariance (N,), else 1."""
        import torch

        weight = torch.ones_like(cov)
        if self.covariance_frac > 0:
            candidates = ((cov > self.covariance_low) & (cov < self.covariance_high)).nonzero()[:, 0]
            order = torch.randperm(len(candidates), generator=generator).to(cov.device)
            weight[candidates[order[: max(1, int(self.covariance_frac * len(cov)))]]] = 0
        return weight


@dataclass(frozen=True)
class GradientNorm(Rival):
    """Clip each token's gradient of the last layer to a norm: w = min(1, c / ‖g‖).

    Attributes:
        max_token_gradient: c; inf is off.
    """

    name: ClassVar[str] = "gradient_norm"
    asks_head: ClassVar[bool] = True
    max_token_gradient: float = math.inf

    def __post_init__(self):
        """Check the range."""
        if not self.max_token_gradient > 0:
            raise ValueError(f"max_token_gradient must be greater than 0, got {self.max_token_gradient}")

    def weight(self, tokens, log_mass, generator) -> Tensor:
        """As `Rival.weight`: in (0, 1], NaN where the norm is."""
        return (self.max_token_gradient / tokens.gradient_norm()).clamp(max=1)


RULES: dict[str, type[TokenRule]] = {
    rule.name: rule for rule in (TokenRule, Mask, Scale, Improbable, Probability, Covariance, GradientNorm)
}


def rule_settings(rule: type[TokenRule]) -> tuple[str, ...]:
    """The names of a rule's settings."""
    return tuple(field.name for field in fields(rule))


def observed(policy_shift: Tensor, objective_shift: Tensor, max_policy_shift: float = math.inf) -> TokenSelection:
    """Every finite token with weight 1, and which of them are over a bound on m_F; shifts (N,) each."""
    from open_r1_capo.capo.selection import TokenSelection

    non_finite = ~(policy_shift.isfinite() & objective_shift.isfinite())
    over_policy = ~non_finite & (policy_shift > max_policy_shift)
    none = non_finite & False
    weight = (~non_finite).to(policy_shift.dtype)
    return TokenSelection(weight, policy_shift, objective_shift, over_policy, none, non_finite, none)


def covariance(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """Each token's share of Cov(log π, A), which drives the entropy down: (A - mean A)(log π - mean log π), (N,)."""
    advantages = advantages.to(log_prob.dtype)
    return (advantages - advantages.mean()) * (log_prob - log_prob.mean())


def _is_share(rule: TokenRule, key: str) -> None:
    if not 0 <= getattr(rule, key) <= 1:
        raise ValueError(f"{key} is a share between 0 and 1, got {getattr(rule, key)}")
