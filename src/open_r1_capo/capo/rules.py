"""Rival rules that act in CAPO's own regime: one update a batch, where every probability ratio is 1.

There the whole family of clipped ratios changes nothing; these rules do. Each is a weight on a token's gradient, as
`selection.py`'s are, so that it can stand in for Eq. 11 with everything else equal.

| rule | source | function |
|---|---|---|
| advantage reweighting (AR) | arXiv 2505.12929 | `probability_weight` |
| Clip-Cov | arXiv 2505.22617 | `covariance_weight` |
| gradient-norm clipping, per token | Pascanu et al., arXiv 1211.5063, on each token's own gradient | `norm_weight` |
"""

from __future__ import annotations

import torch
from torch import Tensor

from open_r1_capo.capo.last_layer import TokenBatch


def action_log_prob(batch: TokenBatch, log_mass: Tensor) -> Tensor:
    """The sampled tokens' log-probabilities under the full policy.

    Args:
        batch: N tokens.
        log_mass: (N,), log of the policy's probability of the support.

    Returns:
        (N,), in nats, ≤ 0.
    """
    on_support = batch.probs.to(batch.dtype).gather(1, batch.action_index[:, None])[:, 0]
    return (on_support.log() + log_mass.to(batch.dtype)).clamp(max=0)


def probability_weight(log_prob: Tensor, alpha: float) -> Tensor:
    """Advantage reweighting (arXiv 2505.12929): w = α π(a) + 1 - α, so that unlikely tokens count less.

    Args:
        log_prob: (N,), from `action_log_prob`.
        alpha: α in [0, 1]; 0 is off, the authors use 0.3.

    Returns:
        (N,) in [1 - α, 1].
    """
    return alpha * log_prob.exp() + (1 - alpha)


def covariance(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """Each token's share of Cov(log π, A), which drives the entropy down (arXiv 2505.22617).

    Args:
        log_prob: (N,), from `action_log_prob`.
        advantages: A_N.

    Returns:
        (N,), (A - mean A)(log π - mean log π).
    """
    advantages = advantages.to(log_prob.dtype)
    return (advantages - advantages.mean()) * (log_prob - log_prob.mean())


def covariance_weight(
    cov: Tensor, frac: float, bounds: tuple[float, float], generator: torch.Generator | None = None
) -> Tensor:
    """Clip-Cov (arXiv 2505.22617): leave a few random tokens out among those whose covariance is large.

    Args:
        cov: (N,), from `covariance` of one micro-batch.
        frac: r; max(1, ⌊r N⌋) tokens are left out if there are as many, as in the authors' code; 0 is off.
        bounds: (low, high); a token may be left out if low < cov < high.
        generator: of the choice, on the CPU.

    Returns:
        (N,), 0 or 1.
    """
    weight = torch.ones_like(cov)
    if frac > 0:
        candidates = ((cov > bounds[0]) & (cov < bounds[1])).nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=generator).to(cov.device)
        weight[candidates[order[: max(1, int(frac * len(cov)))]]] = 0
    return weight


def gradient_norm(batch: TokenBatch) -> Tensor:
    """The Frobenius norm ‖g‖ = |A| ‖v‖ ‖x‖ of each token's gradient of the last layer (Eq. 7), on its support.

    Args:
        batch: N tokens.

    Returns:
        (N,).
    """
    dtype = batch.dtype
    return batch.advantages.to(dtype).abs() * batch.score.norm(dim=1) * batch.features.to(dtype).norm(dim=1)


def norm_weight(norm: Tensor, bound: float) -> Tensor:
    """Gradient clipping token by token: w = min(1, c / ‖g‖).

    Args:
        norm: (N,), from `gradient_norm`.
        bound: c; inf is off.

    Returns:
        (N,) in (0, 1]; NaN where the norm is.
    """
    return (bound / norm).clamp(max=1)
