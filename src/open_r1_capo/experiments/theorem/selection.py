"""Which candidate steps the theorem accepts (Eq. 12, Eq. 69), and the step that they make together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from open_r1_capo.experiments.theorem import mdp
from open_r1_capo.experiments.theorem.mdp import Problem, Values


def penalty(discount: float | Tensor, horizon: int) -> float | Tensor:
    """C / ε: of Lemma E.1 (Eq. 65) if `horizon` is 0, of Lemma K.3 (Eq. 100) otherwise."""
    if horizon:
        return horizon * ((horizon - 1) * (2 * horizon - 1) / 3) ** 0.5
    return 2 * discount / (1 - discount) ** 2 * 2**0.5


def largest_share(discount: float, horizon: int) -> float:
    """The largest ω / (C √δ_F) with which any step of any problem can be accepted: Z ε √2 / C (ours).

    An accepted step has ω ≤ gᵀΔθ, as m_H ≥ ω + ½ M r² and ½ ΔθᵀHΔθ ≤ ½ M r², and gᵀΔθ ≤ Z ε √(2 m_F) by
    Cauchy–Schwarz. That is (1 - γ) / (2 γ) without end and √(6 / ((T - 1)(2 T - 1))) with T steps. Below 1, i.e. with
    γ > 1/3 or T > 2, the theorem's ω ≥ C √δ_F accepts nothing.
    """
    mass = horizon or 1 / (1 - discount)
    factor = penalty(discount, horizon)
    return mass * 2**0.5 / factor if factor else math.inf


@dataclass(frozen=True)
class Variant:
    """One reading of the theorem.

    Attributes:
        name: for the tables.
        objective: whether H is ∇²J (Assumption E.1), or ∇² of the surrogate L_π (Lemma E.1 and CAPO's model).
        margin: δ_H = ω + margin · M r²: ½ in the main text and Eq. 69, 1 in the proof.
        region: whether M bounds ‖H‖ along the whole step, or at θ alone.
    """

    name: str
    objective: bool
    margin: float
    region: bool


VARIANTS = (
    Variant("H of the surrogate, ½ M r²", False, 0.5, False),
    Variant("H of the surrogate, M r²", False, 1.0, False),
    Variant("H of J, ½ M r²", True, 0.5, False),
    Variant("H of J, M r²", True, 1.0, False),
    Variant("H of J, ½ M r², M along the step", True, 0.5, True),
    Variant("H of J, M r², M along the step", True, 1.0, True),
)


@dataclass(frozen=True)
class Batch:
    """N instances of one family and all that is known before a step is taken."""

    problem: Problem
    horizon: int
    weight: Tensor  # (N, A, D)
    values: Values
    steps: Tensor  # (N, K, P)
    gradient: Tensor  # (N, P)
    objective_hessian: Tensor  # (N, P, P)
    surrogate_hessian: Tensor  # (N, P, P)
    fisher: Tensor  # (N, P, P)

    @classmethod
    def of(cls, problem: Problem, horizon: int, weight: Tensor, steps: Tensor) -> Batch:
        """Compute g, both H and F at the policy `weight`."""
        values = mdp.evaluate(problem, horizon, weight)
        return cls(
            problem,
            horizon,
            weight,
            values,
            steps,
            mdp.gradient(problem, values, weight),
            mdp.objective_hessian(problem, horizon, weight),
            mdp.surrogate_hessian(problem, values, weight),
            mdp.fisher(problem, values, weight),
        )

    def at(self, index: Tensor) -> Batch:
        """Some of the instances, by their indices (n,)."""
        parts = (self.steps, self.gradient, self.objective_hessian, self.surrogate_hessian, self.fisher)
        values = Values(*(part[index] for part in self.values))
        chosen = (part[index] for part in parts)
        return Batch(self.problem.at(index), self.horizon, self.weight[index], values, *chosen)

    @property
    def radius(self) -> Tensor:
        """(N,), r: the norm of the longest candidate."""
        return self.steps.norm(dim=-1).amax(-1)

    @property
    def advantage_bound(self) -> Tensor:
        """(N,), ε: the largest |A(s, a)| where the policy can go."""
        there = self.values.visits > 0
        return (self.values.advantages.abs().amax(-1) * there).amax((-1, -2))

    @property
    def penalty(self) -> Tensor:
        """(N,), C of Lemma E.1, or of Lemma K.3 with a finite horizon: J(π') ≥ L_π(π') - C √KL."""
        return penalty(self.problem.discount, self.horizon) * self.advantage_bound

    def hessian(self, variant: Variant) -> Tensor:
        """(N, P, P), what the variant calls H."""
        return self.objective_hessian if variant.objective else self.surrogate_hessian

    def policy_shift(self, step: Tensor) -> Tensor:
        """m_F of steps (N, K, P) or (N, P), in nats (Eq. 64)."""
        return mdp.quadratic(step, self.fisher) / 2

    def slope(self, step: Tensor) -> Tensor:
        """gᵀΔθ of steps (N, K, P) or (N, P)."""
        return torch.einsum("nkp,np->nk", step, self.gradient) if step.ndim == 3 else (step * self.gradient).sum(-1)

    def objective_shift(self, step: Tensor, hessian: Tensor) -> Tensor:
        """m_H of steps (N, K, P) or (N, P), with H (N, P, P) (Eq. 64)."""
        return self.slope(step) + mdp.quadratic(step, hessian) / 2


@dataclass(frozen=True)
class Selection:
    """What one variant accepts of each of N instances."""

    accepted: Tensor  # (N, K), bool
    omega: Tensor  # (N,), ω
    max_policy_shift: Tensor  # (N,), δ_F
    curvature: Tensor  # (N,), M
    step: Tensor  # (N, P), the mean of the accepted steps; 0 where nothing is accepted

    @property
    def some(self) -> Tensor:
        """(n,), the indices of the instances where something is accepted."""
        return self.accepted.any(-1).nonzero()[:, 0]

    def at(self, index: Tensor) -> Selection:
        """Some of the instances."""
        parts = (self.accepted, self.omega, self.max_policy_shift, self.curvature, self.step)
        return Selection(*(part[index] for part in parts))


def accepts(objective_shift: Tensor, policy_shift: Tensor, min_objective: Tensor, max_policy: Tensor) -> Tensor:
    """(N, K) bool, Eq. 69: m_H ≥ δ_H and m_F ≤ δ_F, with each instance's own thresholds (N,)."""
    return (objective_shift >= min_objective[:, None]) & (policy_shift <= max_policy[:, None])


def mean_step(steps: Tensor, chosen: Tensor) -> Tensor:
    """(N, P), the aggregated update: the mean of the chosen ones of the steps (N, K, P), 0 if there are none."""
    return (steps * chosen[..., None]).sum(1) / chosen.sum(1).clamp(min=1)[:, None]


def select(batch: Batch, variant: Variant, curvature: Tensor) -> Selection:
    """Accept steps with δ_F the upper quartile of m_F and ω the median of what the steps below it leave for ω.

    So ω, which the theorem leaves open, is as large as each instance's candidates allow; M is `curvature` (N,).
    Nothing is accepted where no candidate has m_H > margin · M r².
    """
    shift_h, shift_f = batch.objective_shift(batch.steps, batch.hessian(variant)), batch.policy_shift(batch.steps)
    max_policy = shift_f.quantile(0.75, dim=1)
    term = variant.margin * curvature * batch.radius.square()
    left = shift_h - term[:, None]
    usable = (left > 0) & (shift_f <= max_policy[:, None])
    omega = left.masked_fill(~usable, float("nan")).nanmedian(1).values
    accepted = accepts(shift_h, shift_f, omega + term, max_policy) & usable
    return Selection(accepted, omega, max_policy, curvature, mean_step(batch.steps, accepted))


def choose(batch: Batch, variant: Variant, rounds: int = 20) -> Selection:
    """Select with the variant's M; an instance without a consistent M along its step has nothing accepted.

    A bound along the step depends on the step, and the step on the bound: M grows until it bounds ‖H‖ everywhere on
    the step that it leads to.
    """
    curvature = mdp.norm(batch.hessian(variant))
    chosen = select(batch, variant, curvature)
    if not variant.region:
        return chosen
    open_ = chosen.some  # whose step is not yet known to be inside the bound
    for _ in range(rounds):
        if not len(open_):
            break
        part, tried = batch.at(open_), chosen.at(open_)
        needed = mdp.norm(mdp.way_hessians(part.problem, part.horizon, part.weight, tried.step)).amax(0)
        # a little more than needed, so that the bound is reached in a few rounds
        curvature[open_] = torch.where(needed > tried.curvature, 1.01 * needed, tried.curvature)
        open_ = open_[(needed > tried.curvature) & tried.accepted.any(-1)]
        chosen = select(batch, variant, curvature)
    chosen.accepted[open_] = False
    return chosen
