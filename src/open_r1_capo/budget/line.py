"""Move parameters along an optimizer step that has been taken: θ(s) = θ_old + s · (θ_new - θ_old).

After `optimizer.step()`, s = 1. Moving to another s needs no copy of the parameters where the step follows from what
the optimizer keeps, its moments and the gradients. Every supported optimizer takes θ_new = θ_old - η (d + c θ_old)
with a rate η, a direction d and a decoupled weight decay c, so that from any s

    θ_old = (θ_s + s η d) / (1 - s η c)        θ_s' = θ_s - (s' - s) η (d + c θ_old)

| optimizer | d | c |
|---|---|---|
| `Adam`, `AdamW` (any of their options) | m̂ / (√v̂ + ε), of the moments after the step | the decay of AdamW |
| `SGD` with momentum | the momentum buffer | 0 |
| `SGD` with Nesterov momentum | gradient + μ · buffer | 0, or the decay |
| `SGD` | the gradient | the decay |

Any other optimizer's step is undone from a copy of what is trained, if that is small enough (LoRA).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

COPY_BYTES = 2**30  # of trained parameters that an unknown optimizer's step may copy

Group = dict[str, Any]


class Line:
    """The line through θ_old and θ_new of a supported optimizer's step, without a copy.

    Args:
        optimizer: `torch.optim.Adam`, `AdamW` or `SGD`, without wrappers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._direction = _adam if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else _sgd
        self._moved: list[tuple[Group, float, Tensor]] = []
        self.s = 1.0

    def begin(self) -> None:
        """Remember, before `optimizer.step()`, which parameters it will move, and at which rate."""
        self.s = 1.0
        self._moved = [(group, float(group["lr"]), p) for group, p in _with_gradient(self.optimizer)]

    @torch.no_grad()
    def move(self, s: float) -> None:
        """Put the parameters to θ(s); exact up to the rounding of their dtype."""
        for group, lr, parameter in self._moved:
            direction, decay = self._direction(group, parameter, self.optimizer.state[parameter])
            if decay:
                old = (parameter + direction * (self.s * lr)) / (1 - self.s * lr * decay)
                direction = direction + decay * old
            parameter.add_(direction, alpha=-(s - self.s) * lr)
        self.s = s


class CopiedLine:
    """The same for any optimizer, by a copy of what it trains.

    Args:
        optimizer: without wrappers.
        copy_bytes: the largest copy that is made.

    Raises:
        ValueError: the parameters take more than that.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, copy_bytes: int = COPY_BYTES):
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        size = sum(p.numel() * p.element_size() for p in parameters)
        if size > copy_bytes:
            raise ValueError(
                f"the step of {type(optimizer).__name__} cannot be pulled back from its state, and its parameters "
                f"take {size / 2**30:.1f} GiB, over copy_bytes ({copy_bytes / 2**30:.1f} GiB): use Adam, AdamW, SGD, "
                "train fewer parameters (LoRA), or raise copy_bytes"
            )
        self.optimizer = optimizer
        self._old: list[tuple[Tensor, Tensor]] = []
        self.s = 1.0

    def begin(self) -> None:
        """Copy, before `optimizer.step()`, the parameters that it will move."""
        self.s = 1.0
        self._old = [(p, p.detach().clone()) for _, p in _with_gradient(self.optimizer)]

    @torch.no_grad()
    def move(self, s: float) -> None:
        """Put the parameters to θ(s); θ(0) is the copy, bit for bit."""
        for parameter, old in self._old:
            if s == 0:
                parameter.copy_(old)
            else:
                parameter.copy_(old + (parameter - old) * (s / self.s))
        self.s = s


def line_of(optimizer: torch.optim.Optimizer, copy_bytes: int = COPY_BYTES) -> Line | CopiedLine:
    """The line of an optimizer's steps: from its state where that is known, else a copy (ValueError: too large)."""
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):  # a subclass may step otherwise
        return Line(optimizer)
    return CopiedLine(optimizer, copy_bytes)


def _with_gradient(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Group, Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter


def _adam(group: Group, parameter: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, float]:
    """d and c of a step that Adam has taken, from its state after it."""
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    root = (second.sqrt() / (1 - float(beta2) ** step) ** 0.5).add_(group["eps"])
    direction = (state["exp_avg"] / (1 - float(beta1) ** step)).div_(root)
    return direction.to(parameter.dtype), group["weight_decay"] if group["decoupled_weight_decay"] else 0.0


def _sgd(group: Group, parameter: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, float]:
    """d and c of a step that SGD has taken, from its momentum and the gradient."""
    buffer, momentum = state.get("momentum_buffer"), group["momentum"]
    if momentum and not group["nesterov"]:
        return buffer, 0.0
    gradient = -parameter.grad if group["maximize"] else parameter.grad
    return gradient + momentum * buffer if momentum else gradient, group["weight_decay"]
