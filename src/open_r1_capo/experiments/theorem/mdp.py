"""Small Markov decision processes with a softmax policy, whose J, g, H, F, KL and advantages are exact, in float64.

Shapes: `...` instances (none, or any leading dimensions that broadcast), S states, A actions, D features of a state,
L layers of time (1 for a discounted problem, T for a horizon of T steps), P = A·D parameters. A policy's weight W is
(..., A, D), its logits are W h(s) (§4.1); one-hot features make it tabular.

State weights are unnormalised, Σ_t γ^t P(s_t = s): they sum to the `mass` Z, 1 / (1 - γ) or T. With them g is ∇J; the
Fisher and the KL are averages over states (Assumption E.1, Eq. 106), so they are divided by Z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Instances of one shape."""

    start: Tensor  # (..., S), ρ₀
    transition: Tensor  # (..., S, A, S)
    reward: Tensor  # (..., S, A)
    features: Tensor  # (..., S, D), h(s)
    discount: Tensor  # (...), γ; 1 where the horizon is finite

    def at(self, index: Tensor | int | slice) -> Problem:
        """Some of the instances."""
        return Problem(*(part[index] for part in self))

    def stretched(self) -> Problem:
        """Instances with one more dimension in front, which broadcasts against several weights of each."""
        return Problem(*(part[None] for part in self))


class Values(NamedTuple):
    """What a policy is worth, and where it goes."""

    objective: Tensor  # (...), J
    visits: Tensor  # (..., L, S), Σ_t γ^t P(s_t = s), or P(s_t = s) of each step t
    advantages: Tensor  # (..., L, S, A)


def log_policy(problem: Problem, weight: Tensor) -> Tensor:
    """(..., S, A), log π(a | s)."""
    return torch.log_softmax(problem.features @ weight.transpose(-1, -2), -1)


def evaluate(problem: Problem, horizon: int, weight: Tensor) -> Values:
    """J, state weights and advantages of a policy; `horizon` is T, or 0 for a discounted problem without end."""
    probs = log_policy(problem, weight).exp()
    moves = torch.einsum("...sa,...sat->...st", probs, problem.transition)
    gains = (probs * problem.reward).sum(-1)
    return (_finite if horizon else _discounted)(problem, horizon, probs, moves, gains)


def _discounted(problem: Problem, horizon: int, probs: Tensor, moves: Tensor, gains: Tensor) -> Values:
    gamma = problem.discount[..., None, None]
    system = torch.eye(moves.shape[-1], dtype=moves.dtype) - gamma * moves
    value = torch.linalg.solve(system, gains[..., None])[..., 0]
    start = problem.start.expand(value.shape)
    visits = torch.linalg.solve(system.transpose(-1, -2), start[..., None])[..., 0]
    advantages = problem.reward + gamma * _next_value(problem, value) - value[..., None]
    return Values((start * value).sum(-1), visits[..., None, :], advantages[..., None, :, :])


def _finite(problem: Problem, horizon: int, probs: Tensor, moves: Tensor, gains: Tensor) -> Values:
    value, advantages = torch.zeros_like(gains), []
    for _ in range(horizon):
        ahead = problem.reward + _next_value(problem, value)
        value = (probs * ahead).sum(-1)
        advantages.append(ahead - value[..., None])
    visits = [problem.start.expand(value.shape)]
    for _ in range(horizon - 1):
        visits.append(torch.einsum("...s,...st->...t", visits[-1], moves))
    return Values((visits[0] * value).sum(-1), torch.stack(visits, -2), torch.stack(advantages[::-1], -3))


def _next_value(problem: Problem, value: Tensor) -> Tensor:
    return torch.einsum("...sat,...t->...sa", problem.transition, value)


def objective(problem: Problem, horizon: int, weight: Tensor) -> Tensor:
    """(...), J (Eq. 1, Eq. 84)."""
    return evaluate(problem, horizon, weight).objective


def surrogate(problem: Problem, values: Values, weight: Tensor) -> Tensor:
    """(...), L_π(π') of a policy π' = `weight` around the one that has the `values` (Lemma E.1, K.3)."""
    gained = (log_policy(problem, weight).exp()[..., None, :, :] * values.advantages).sum(-1)
    return values.objective + (values.visits * gained).sum((-1, -2))


def state_kl(problem: Problem, weight: Tensor, other: Tensor) -> Tensor:
    """(..., S), KL(π(·|s) ‖ π'(·|s)) of the policies `weight` and `other`, in nats."""
    old, new = log_policy(problem, weight), log_policy(problem, other)
    # Σ π (π'/π − 1 − log π'/π): no sum of terms that cancel, which would lose a KL below 1e-16
    return (old.exp() * (torch.expm1(new - old) - (new - old))).sum(-1)


def average(values: Values, of_states: Tensor) -> Tensor:
    """(...), the mean over d_π of a function of states (..., S)."""
    return (values.visits * of_states[..., None, :]).sum((-1, -2)) / mass(values)


def mass(values: Values) -> Tensor:
    """(...), Z = Σ_t γ^t: the effective horizon."""
    return values.visits.sum((-1, -2))


def scores(problem: Problem, weight: Tensor) -> Tensor:
    """(..., S, A, P), ∇ log π(a | s) = (e_a - π) ⊗ h (Eq. 45)."""
    probs = log_policy(problem, weight).exp()
    apart = torch.eye(probs.shape[-1], dtype=probs.dtype) - probs[..., None, :]
    return (apart[..., None] * problem.features[..., :, None, None, :]).flatten(-2)


def gradient(problem: Problem, values: Values, weight: Tensor) -> Tensor:
    """(..., P), g = E Σ γ^t A ∇ log π (Eq. 31, Eq. 67)."""
    weighted = (values.visits[..., None] * values.advantages).sum(-3) * log_policy(problem, weight).exp()
    return torch.einsum("...sa,...sap->...p", weighted, scores(problem, weight))


def state_fisher(problem: Problem, weight: Tensor) -> Tensor:
    """(..., S, P, P), E_a ∇ log π ∇ log πᵀ of each state."""
    score, probs = scores(problem, weight), log_policy(problem, weight).exp()
    return torch.einsum("...sa,...sap,...saq->...spq", probs, score, score)


def fisher(problem: Problem, values: Values, weight: Tensor) -> Tensor:
    """(..., P, P), F of `weight` averaged over the state weights of `values` (Eq. 9, Assumption B.1)."""
    visits = values.visits.sum(-2) / mass(values)[..., None]
    return torch.einsum("...s,...spq->...pq", visits, state_fisher(problem, weight))


def surrogate_hessian(problem: Problem, values: Values, weight: Tensor) -> Tensor:
    """(..., P, P), ∇² L_π at `weight` = E Σ γ^t A (∇ log π ∇ log πᵀ - F(s)) (Eq. 37, Eq. 44): what CAPO models."""
    score, probs = scores(problem, weight), log_policy(problem, weight).exp()
    weighted = (values.visits[..., None] * values.advantages).sum(-3) * probs
    outer = torch.einsum("...sa,...sap,...saq->...pq", weighted, score, score)
    return outer - torch.einsum("...s,...spq->...pq", weighted.sum(-1), state_fisher(problem, weight))


def objective_hessian(problem: Problem, horizon: int, weight: Tensor) -> Tensor:
    """(N, P, P), ∇²J of N instances by autograd, which also differentiates where the policy goes (Assumption E.1)."""

    def flat(vector: Tensor, one: Problem) -> Tensor:
        return objective(one, horizon, vector.view(weight.shape[-2:]))

    # reverse mode twice: forward mode through linalg.solve under vmap is wrong by orders of magnitude in torch 2.13
    return torch.func.vmap(torch.func.jacrev(torch.func.jacrev(flat)))(weight.flatten(-2), problem)


@dataclass(frozen=True)
class Segment:
    """The way from θ to θ + Δθ at Gauss–Legendre points, so that integrals along it are sums."""

    points: Tensor  # (G,), τ in (0, 1)
    shares: Tensor  # (G,), sum 1
    objective_hessian: Tensor  # (G, N, P, P)
    surrogate_hessian: Tensor  # (G, N, P, P)
    fisher: Tensor  # (G, N, P, P)

    def remainder(self, along: Tensor, first: Tensor, step: Tensor) -> Tensor:
        """(N,), ∫ (1 - τ) Δθᵀ (C(τ) - C(0)) Δθ dτ of one of the curvatures `along` (Eq. 15, Eq. 25)."""
        return torch.einsum("g,np,gnpq,nq->n", (1 - self.points) * self.shares, step, along - first, step)

    def lipschitz(self, along: Tensor, first: Tensor, step: Tensor) -> Tensor:
        """(N,), the least constant of Assumption A.1 or B.1 at the points of the segment."""
        growth = norm(along - first) / self.points[:, None]
        return growth.amax(0) / step.norm(dim=-1).clamp(min=torch.finfo(step.dtype).tiny)


def segment(problem: Problem, horizon: int, values: Values, weight: Tensor, step: Tensor, count: int = 12) -> Segment:
    """The curvatures of N instances along their steps (N, P).

    12 points integrate a softmax policy's curvature over steps of norm 3 to ten digits.
    """
    points, shares = gauss_legendre(count)
    paths = way(points, weight, step)
    many, there = problem.stretched(), Values(*(part[None] for part in values))
    return Segment(
        points,
        shares,
        way_hessians(problem, horizon, weight, step, count),
        surrogate_hessian(many, there, paths),
        fisher(many, there, paths),
    )


def way(points: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    """(G, N, A, D), the weights at the shares `points` (G,) of the steps (N, P)."""
    return weight + points[:, None, None, None] * step.view(weight.shape)


def way_hessians(problem: Problem, horizon: int, weight: Tensor, step: Tensor, count: int = 12) -> Tensor:
    """(G, N, P, P), ∇²J at the points of `segment`."""
    return torch.stack(
        [objective_hessian(problem, horizon, path) for path in way(gauss_legendre(count)[0], weight, step)]
    )


def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Points and weights of Gauss–Legendre quadrature on (0, 1), by the eigenvalues of the Jacobi matrix."""
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    places, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (places + 1) / 2, vectors[0].square()


def norm(matrices: Tensor) -> Tensor:
    """(...), the operator norm of symmetric matrices (..., P, P)."""
    return torch.linalg.eigvalsh(matrices).abs().amax(-1)


def quadratic(step: Tensor, matrix: Tensor) -> Tensor:
    """(..., K) or (...), Δθᵀ C Δθ of steps (..., K, P) or (..., P) in curvatures (..., P, P)."""
    if step.ndim == matrix.ndim:
        return torch.einsum("...kp,...pq,...kq->...k", step, matrix, step)
    return torch.einsum("...p,...pq,...q->...", step, matrix, step)
