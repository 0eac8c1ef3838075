"""How far a step moves the objective and the policy (paper Eq. 10, App. D), from the logit change z alone.

A step α·D of the last layer changes token i's logits by α·z_i with z = D x. Everything below is a function of z, the
score v, the policy π and the advantage A; only the closed form of SGD (`sgd_shifts`) reads the features x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_r1_capo.capo.last_layer import TokenBatch


def directional_score(batch: TokenBatch, z: Tensor) -> Tensor:
    """(N,), vᵀz: the change of log π(a) along the step, per unit α."""
    return (batch.score * z).sum(1)


def expected_fisher(batch: TokenBatch, z: Tensor) -> Tensor:
    """(N,), zᵀF(s)z = Var_π(z): the Fisher curvature with the exact mean over actions (App. D.2)."""
    probs = batch.probs.to(z.dtype)
    centred = z - (probs * z).sum(1, keepdim=True)
    return (probs * centred.square()).sum(1)


def fisher(batch: TokenBatch, z: Tensor) -> Tensor:
    """(N,), (vᵀz)²: the Fisher curvature at the sampled action (Eq. 57, 58)."""
    return directional_score(batch, z).square()


def hessian(batch: TokenBatch, z: Tensor) -> Tensor:
    """(N,), A [(vᵀz)² - Var_π(z)]: the curvature of the objective along the step (Eq. 62, 63)."""
    return batch.advantages.to(z.dtype) * (fisher(batch, z) - expected_fisher(batch, z))


def policy_shift(batch: TokenBatch, z: Tensor, lr: float, granularity: str = "token") -> Tensor:
    """(N,), the policy shift m_F = ½ α² · Fisher in nats (Eq. 10), each token's a mean over its subset.

    `z` comes from `propose` with the same granularity; `lr` is the learning rate α.
    """
    return subset_mean(batch, 0.5 * lr**2 * fisher(batch, z), granularity)


def objective_shift(batch: TokenBatch, z: Tensor, lr: float, granularity: str = "token") -> Tensor:
    """(N,), the objective shift m_H = α A vᵀz + ½ α² · Hessian (Eq. 10, ⟨g, D⟩ = A vᵀz); as `policy_shift`."""
    slope = batch.advantages.to(z.dtype) * directional_score(batch, z)
    return subset_mean(batch, lr * slope + 0.5 * lr**2 * hessian(batch, z), granularity)


def predicted_kl(batch: TokenBatch, z: Tensor, lr: float) -> Tensor:
    """(N,), ½ α² Var_π(z): each token's KL(π ‖ π_new) of a step (Eq. 6), in nats."""
    return 0.5 * lr**2 * expected_fisher(batch, z)


def support_kl(batch: TokenBatch, log_mass: Tensor, new_log_probs: Tensor) -> Tensor:
    """The measured KL(π ‖ π_new) of each token on the partition {support ids, everything else}.

    Exact when the support is the vocabulary, a lower bound otherwise (merging outcomes never raises a divergence).

    Args:
        batch: N tokens with the policy before the step.
        log_mass: (N,), log of the old policy's probability of the support.
        new_log_probs: (N, K), the new policy's log-probabilities at `batch.token_ids`, over the full vocabulary.

    Returns:
        (N,) float64, in nats, ≥ 0.
    """
    present = batch.probs > 0
    log_mass = log_mass.double().clamp(max=0)  # float64: a KL of 1e-6 is a difference of sums near 1
    old = (batch.probs.double().log() + log_mass[:, None]).masked_fill(~present, 0)
    new = new_log_probs.double().masked_fill(~present, 0)
    inside = (old.exp() * (old - new)).masked_fill(~present, 0).sum(1)
    rest_old = -torch.expm1(log_mass)
    rest_new = 1 - new.exp().masked_fill(~present, 0).sum(1)
    tiny = torch.finfo(torch.float32).eps
    outside = torch.where(rest_old > tiny, rest_old * (rest_old.clamp(min=tiny) / rest_new.clamp(min=tiny)).log(), 0)
    return (inside + outside).clamp(min=0)


def objective_change(batch: TokenBatch, log_mass: Tensor, new_log_probs: Tensor) -> Tensor:
    """(N,) float64, the measured change of the surrogate objective, A (π_new(a) / π(a) - 1): what m_H predicts.

    In units of the advantage; arguments as `support_kl`.
    """
    action = batch.action_index[:, None]
    old = batch.probs.double().gather(1, action)[:, 0].log() + log_mass.double().clamp(max=0)
    return batch.advantages.double() * torch.expm1(new_log_probs.double().gather(1, action)[:, 0] - old)


def subset_mean(batch: TokenBatch, values: Tensor, granularity: str) -> Tensor:
    """(N,), the mean of `values` (N,) over each token's subset, handed back to every token of it."""
    if granularity == "token":
        return values
    _, subset = torch.unique(batch.subsets(granularity), return_inverse=True)
    size = torch.bincount(subset).to(values.dtype)
    return (values.new_zeros(len(size)).index_add_(0, subset, values) / size)[subset]


@dataclass(frozen=True)
class VocabularySums:
    """What the SGD model's closed form needs of the policy over the *full* vocabulary, per token.

    The sums leave the sampled action out: for an action of probability near 1, a difference of whole sums, such as
    1 - 2π_a + Σπ², would be rounding alone.
    """

    action_prob: Tensor  # (N,), π_a
    rest: Tensor  # (N,), q = Σ_{j≠a} π_j = 1 - π_a
    square: Tensor  # (N,), S₂ = Σ_{j≠a} π_j²
    cube: Tensor  # (N,), S₃ = Σ_{j≠a} π_j³

    @staticmethod
    def of(probs: Tensor, actions: Tensor) -> VocabularySums:
        """Of policies (N, V) and the sampled actions (N,) int64."""
        others = probs.scatter(1, actions[:, None], 0)
        action_prob = probs.gather(1, actions[:, None])[:, 0]
        return VocabularySums(action_prob, others.sum(1), others.square().sum(1), others.pow(3).sum(1))


def sgd_shifts(batch: TokenBatch, sums: VocabularySums, lr: float) -> tuple[Tensor, Tensor]:
    """m_F and m_H, (N,) each, of a token's own SGD step over the full vocabulary: D = A v ⊗ x, z = A ‖x‖² v.

    With vᵀv = q² + S₂ and Var_π(v) = π_a q³ + 2π_a q S₂ + S₃ - S₂², no support is needed. Of the batch, only features
    and advantages are read; `sums` are over the full vocabulary, `lr` is α.
    """
    action, rest, square, cube = sums.action_prob, sums.rest, sums.square, sums.cube
    advantages = batch.advantages.to(batch.dtype)
    stretch = advantages * batch.features.to(batch.dtype).square().sum(1)
    slope = stretch * (rest.square() + square)
    variance = stretch.square() * (action * rest * (rest.square() + 2 * square) + cube - square.square())
    fisher_N = slope.square()
    objective = lr * advantages * slope + 0.5 * lr**2 * advantages * (fisher_N - variance)
    return 0.5 * lr**2 * fisher_N, objective
