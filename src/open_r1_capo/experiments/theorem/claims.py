"""Every inequality of the proof as two numbers of an instance: what is used, and what is allowed.

A claim holds on an instance if used ≤ allowed; used / allowed says how tight it is. Identities have an error instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_r1_capo.experiments.theorem import mdp
from open_r1_capo.experiments.theorem.mdp import Segment, Values
from open_r1_capo.experiments.theorem.selection import Batch, Selection, Variant, mean_step

TEXT = {
    "16": "J(θ+Δθ) ≥ J + m_H − L₂‖Δθ‖³/6",
    "26": "|KL − m_F| ≤ L_F‖Δθ‖³/6",
    "65": "J(π') ≥ L_π(π') − C √KL, discounted",
    "65, C / 2": "the same with half of C",
    "66, H of the surrogate": "|L_π(π') − J − m_H| ≤ L‖Δθ‖³/6, H = ∇²L_π",
    "66, H of J": "the same with H = ∇²J, as Assumption E.1 has it",
    "71": "ΔθᵀFΔθ ≤ mean of ΔθᵢᵀFΔθᵢ",
    "74": "ΔθᵀFΔθ ≤ 2 δ_F",
    "78, own": "Σ ΔθᵢᵀHΔθᵢ ≤ M B r²",
    "78, mixed": "Σ_{i≠j} ΔθᵢᵀHΔθⱼ ≥ −M B (B−1) r²",
    "79": "m_H(Δθ) ≥ mean m_H(Δθᵢ) − M r² (1 − 1/B)",
    "79, with ½ M r² (ours)": "m_H(Δθ) ≥ mean m_H(Δθᵢ) − ½ M r²",
    "reach (ours)": "gᵀΔθᵢ ≤ Z ε √(2 m_F(Δθᵢ))",
    "94": "‖d'_t − d_t‖₁ ≤ 2 Σ_{k<t} E TV",
    "97": "‖P_π'(·|s) − P_π(·|s)‖₁ ≤ 2 TV(s)",
    "98": "‖d'_{t+1} − d_{t+1}‖₁ ≤ ‖d'_t − d_t‖₁ + 2 E TV",
    "100": "J(π') ≥ L_π(π') − C √KL, finite horizon",
    "102, first": "|J(π') − L_π(π')| ≤ ε Σ_t ‖d'_t − d_t‖₁",
    "102, second": "|J(π') − L_π(π')| ≤ 2 ε Σ_k (T−1−k) E TV",
    "103": "E TV ≤ √(½ E KL)",
    "104": "|J(π') − L_π(π')| ≤ √2 ε Σ_k (T−1−k) √D_k",
    "105": "Σ b_k √D_k ≤ √Σ b_k² √Σ D_k",
}
CONCLUSIONS = {
    "80": "m_H(Δθ) ≥ ω",
    "81": "gain ≥ m_H(Δθ) − C √m_F(Δθ)",
    "82": "gain ≥ ω − C √δ_F",
    "gain ≥ ω": "gain ≥ ω",
    "gain ≥ 0": "gain ≥ 0",
}
ROUNDING = (1e-6, 1e-12)  # of what is allowed, and of J: what float64 and the quadrature may cost
Claims = dict[str, tuple[Tensor, Tensor]]  # name → used (n,), allowed (n,)


@dataclass(frozen=True)
class Taken:
    """A step Δθ (N, P) of each instance, and what came of it."""

    step: Tensor
    values: Values  # of the policy after the step
    surrogate: Tensor  # (N,), L_π(π')
    state_kl: Tensor  # (N, S)
    state_tv: Tensor  # (N, S)
    kl: Tensor  # (N,), average over d_π

    @classmethod
    def of(cls, batch: Batch, step: Tensor) -> Taken:
        """Take the step and evaluate the policy it leads to."""
        new = batch.weight + step.view(batch.weight.shape)
        before, after = (mdp.log_policy(batch.problem, weight).exp() for weight in (batch.weight, new))
        state_kl = mdp.state_kl(batch.problem, batch.weight, new)
        return cls(
            step,
            mdp.evaluate(batch.problem, batch.horizon, new),
            mdp.surrogate(batch.problem, batch.values, new),
            state_kl,
            (after - before).abs().sum(-1) / 2,
            mdp.average(batch.values, state_kl),
        )

    def gain(self, batch: Batch) -> Tensor:
        """(N,), J(θ + Δθ) - J(θ)."""
        return self.values.objective - batch.values.objective


def identities(batch: Batch, taken: Taken, way: Segment) -> dict[str, Tensor]:
    """(N,) each: |left - right|, as a share of the largest term."""
    step, gain, b = taken.step, taken.gain(batch), batch.steps.shape[1]
    shift = batch.objective_shift(step, batch.objective_hessian)
    rest = way.remainder(way.objective_hessian, batch.objective_hessian, step)
    rest_kl = way.remainder(way.fisher, batch.fisher, step)
    moved = mdp.log_policy(batch.problem, batch.weight + step.view(batch.weight.shape)).exp()
    average = (moved[:, None] * batch.values.advantages).sum(-1)
    apart = batch.steps[:, :, None] - batch.steps[:, None]
    pairs = mdp.quadratic(apart.flatten(1, 2), batch.fisher).sum(-1) / (2 * b * b)
    own = mdp.quadratic(batch.steps, batch.fisher).mean(-1)
    own_h = mdp.quadratic(batch.steps, batch.objective_hessian).sum(-1)
    all_h = mdp.quadratic(batch.steps.sum(1), batch.objective_hessian)
    mean_shift = batch.objective_shift(batch.steps, batch.objective_hessian).mean(-1)
    grouped = mean_shift - (b - 1) / (2 * b * b) * own_h + (all_h - own_h) / (2 * b * b)
    return {
        "15": _error(gain, shift + rest, gain.abs() + shift.abs()),
        "25": _error(taken.kl, batch.policy_shift(step) + rest_kl, taken.kl),
        "73": _error(own - mdp.quadratic(step, batch.fisher), pairs, own),
        "77": _error(shift, grouped, mean_shift.abs() + own_h.abs()),
        "85": _error(gain, (taken.values.visits * average).sum((-1, -2)), gain.abs() + batch.values.objective.abs()),
    }


def _error(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    return (left - right).abs() / scale.clamp(min=1e-9)


def expansions(batch: Batch, taken: Taken, way: Segment) -> Claims:
    """The Taylor bounds and the surrogate's gap, of any step: App. A, B and Lemma E.1 or K.3."""
    step, cube = taken.step, taken.step.norm(dim=-1).pow(3) / 6
    l_j, l_s, l_f = (
        way.lipschitz(along, first, step)
        for along, first in (
            (way.objective_hessian, batch.objective_hessian),
            (way.surrogate_hessian, batch.surrogate_hessian),
            (way.fisher, batch.fisher),
        )
    )
    gap, surrogate = taken.surrogate - taken.values.objective, taken.surrogate - batch.values.objective
    shift_j, shift_s = (batch.objective_shift(step, h) for h in (batch.objective_hessian, batch.surrogate_hessian))
    penalty = batch.penalty * taken.kl.sqrt()
    claims = {
        "16": (shift_j - taken.gain(batch), l_j * cube),
        "26": ((taken.kl - batch.policy_shift(step)).abs(), l_f * cube),
        "66, H of the surrogate": ((surrogate - shift_s).abs(), l_s * cube),
        "66, H of J": ((surrogate - shift_j).abs(), torch.maximum(l_j, l_s) * cube),
        "100" if batch.horizon else "65": (gap, penalty),
    }
    if not batch.horizon:
        claims["65, C / 2"] = (gap, penalty / 2)
    return claims


def aggregation(batch: Batch, variant: Variant) -> Claims:
    """The two global bounds of App. E for the mean of all candidates, which need no selection."""
    h, m, r, b = batch.hessian(variant), mdp.norm(batch.hessian(variant)), batch.radius, batch.steps.shape[1]
    step = mean_step(batch.steps, torch.ones_like(batch.steps[..., 0], dtype=torch.bool))
    shift_f, curved = batch.policy_shift(batch.steps), mdp.quadratic(batch.steps, h).sum(-1)
    mixed = mdp.quadratic(batch.steps.sum(1), h) - curved
    drop = batch.objective_shift(batch.steps, h).mean(-1) - batch.objective_shift(step, h)
    return {
        "71": (2 * batch.policy_shift(step), 2 * shift_f.mean(-1)),
        "74": (2 * batch.policy_shift(step), 2 * shift_f.amax(-1)),
        "78, own": (curved, m * b * r.square()),
        "78, mixed": (-mixed, m * b * (b - 1) * r.square()),
        "79": (drop, m * r.square() * (1 - 1 / b)),
        "79, with ½ M r² (ours)": (drop, m * r.square() / 2),
    }


def reach(batch: Batch) -> Claims:
    """Ours: gᵀΔθ ≤ Z ε √(2 m_F), by Cauchy–Schwarz over states and actions; of each instance's worst candidate."""
    most = mdp.mass(batch.values) * batch.advantage_bound
    allowed = most[:, None] * (2 * batch.policy_shift(batch.steps)).sqrt()
    return {"reach (ours)": _worst(batch.slope(batch.steps), allowed)}


def best_share(batch: Batch) -> Tensor:
    """(N,), the largest gᵀΔθ / (C √m_F) of any step at all, reached by the natural gradient: √(2 gᵀF⁺g) / C."""
    inverse = torch.linalg.pinv(batch.fisher, hermitian=True)
    return (2 * mdp.quadratic(batch.gradient, inverse)).sqrt() / batch.penalty


def finite_horizon(batch: Batch, taken: Taken) -> Claims:
    """The steps of Lemma K.2 and K.3, each at its worst time step or state."""
    t, eps = batch.horizon, batch.advantage_bound
    old, new = batch.values.visits, taken.values.visits
    apart = (new - old).abs().sum(-1)  # (N, T)
    tv, kl = (torch.einsum("nts,ns->nt", old, part) for part in (taken.state_tv, taken.state_kl))
    summed = 2 * (tv.cumsum(-1) - tv)
    before, after = (
        torch.einsum("nsa,nsau->nsu", mdp.log_policy(batch.problem, weight).exp(), batch.problem.transition)
        for weight in (batch.weight, batch.weight + taken.step.view(batch.weight.shape))
    )
    b = torch.arange(t - 1, -1, -1, dtype=torch.float64)
    gap, spent = (taken.values.objective - taken.surrogate).abs(), (b * kl.clamp(min=0).sqrt()).sum(-1)
    claims = {
        "97": _worst((after - before).abs().sum(-1), 2 * taken.state_tv),
        "102, first": (gap, eps * apart.sum(-1)),
        "102, second": (gap, 2 * eps * (b * tv).sum(-1)),
        "103": _worst(tv, (kl.clamp(min=0) / 2).sqrt()),
        "104": (gap, 2**0.5 * eps * spent),
        "105": (spent, b.square().sum().sqrt() * kl.clamp(min=0).sum(-1).sqrt()),
    }
    if t > 1:
        claims["94"] = _worst(apart[:, 1:], summed[:, 1:])
        claims["98"] = _worst(apart[:, 1:], apart[:, :-1] + 2 * tv[:, :-1])
    return claims


def conclusions(batch: Batch, variant: Variant, chosen: Selection, taken: Taken) -> Claims:
    """What the theorem says of the aggregated step, without the cubic terms, as the paper takes them."""
    gain, shift = taken.gain(batch), batch.objective_shift(taken.step, batch.hessian(variant))
    return {
        "80": (chosen.omega, shift),
        "81": (shift - gain, batch.penalty * batch.policy_shift(taken.step).sqrt()),
        "82": (chosen.omega - gain, batch.penalty * chosen.max_policy_shift.sqrt()),
        "gain ≥ ω": (chosen.omega, gain),
        "gain ≥ 0": (-gain, torch.zeros_like(gain)),
    }


def _worst(used: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Of (N, K) pairs, the one of each instance that is closest to failing, (N,) each."""
    index = (used / allowed.clamp(min=1e-300)).argmax(-1, keepdim=True)
    return used.gather(-1, index)[:, 0], allowed.gather(-1, index)[:, 0]


def violated(batch: Batch, used: Tensor, allowed: Tensor) -> Tensor:
    """(N,) bool: used > allowed by more than rounding."""
    relative, absolute = ROUNDING
    slack = relative * allowed.abs() + absolute * batch.values.objective.abs().clamp(min=1)
    return used > allowed + slack
