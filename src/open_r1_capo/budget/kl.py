"""The KL divergence of a step, estimated from log-probabilities of its own tokens alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A mean in nats and its standard error, over `count` tokens."""

    mean: float
    error: float
    count: int


@torch.no_grad()
def sampled_kl(old_log_probs: Tensor, new_log_probs: Tensor, mask: Tensor | None = None) -> Estimate:
    """Estimate KL(π_old ‖ π_new) from the log-probabilities of tokens that were drawn from π_old.

    The mean of k3 = r - 1 - log r with r = π_new(a) / π_old(a), which is never negative and unbiased
    (http://joschu.net/blog/kl-approx.html). Computed in float64: near r = 1 it is the square of a small difference.

    Args:
        old_log_probs: log π_old(a), any shape, in nats.
        new_log_probs: log π_new(a), the same shape.
        mask: the tokens that count, the same shape; None is all of them.

    Returns:
        Mean and standard error in nats a token; NaN where no token counts.

    Raises:
        ValueError: the shapes differ.
    """
    for name, tensor in (("new_log_probs", new_log_probs), ("mask", mask)):
        if tensor is not None and tensor.shape != old_log_probs.shape:
            raise ValueError(f"{name}: expected shape {tuple(old_log_probs.shape)}, got {tuple(tensor.shape)}")
    log_ratio = new_log_probs.double() - old_log_probs.double()
    log_ratio = log_ratio.flatten() if mask is None else log_ratio[mask.bool()]
    k3 = torch.expm1(log_ratio) - log_ratio
    if len(k3) == 0:
        return Estimate(float("nan"), float("nan"), 0)
    error = k3.std() / len(k3) ** 0.5 if len(k3) > 1 else torch.tensor(float("nan"))
    return Estimate(float(k3.mean()), float(error), len(k3))


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether a model answers differently from one training pass to the next.

    Args:
        model: its layers are looked at, and its Hugging Face config, as functions that drop out are no layers.
    """
    layers = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    settings = [v for k, v in vars(model.config).items() if "dropout" in k and isinstance(v, float)]
    return any(value > 0 for value in [*layers, *settings])
