"""KLBudget: an optimizer step whose KL is measured, and that keeps within a budget.

    budget = KLBudget(optimizer, nats=1e-3)
    loss.backward()
    taken = budget.step(lambda: sampled_kl(old_log_probs, log_probs_now(), mask).mean)

The step is taken, the KL(π_old ‖ π_now) of its own tokens is measured, and the parameters are moved along the step
until the KL fits: TRPO's step length (arXiv 1502.05477, App. C) along the optimizer's own direction, without a copy of
the parameters (`line.py`). The moments are those of an ordinary step.

| rule | the step's length |
|---|---|
| `target` | there is no learning rate: the next step starts where the last one ended, and is shortened or lengthened |
| `verify` | the scheduled rate is the upper end: a longer KL is pulled back |

A step is accepted if its KL is at most `tolerance` × the budget (and for `target` at least the budget / `tolerance`,
while passes are left). If the passes run out above the budget, the longest step that was measured to fit is kept, or
none. What is bounded is what `measure` returns: an estimate, or a lower bound, bounds no more than itself.

A step whose gradient is zero everywhere is never lengthened: it has no signal, and Adam's momentum alone would fill
the budget with a random walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from open_r1_capo.budget.line import COPY_BYTES, CopiedLine, line_of

RULES = ("target", "verify")
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    # a step's KL grows with the square of its rate: the budget of a cosine rate
    "cosine2": lambda done: (0.5 * (1 + math.cos(math.pi * done))) ** 2,
}
SMALLEST = 1e-7  # α of the first step: almost nothing, whatever the policy
STRETCH = 10.0  # largest change of α between two passes; the KL of a very short step is rounding
LENGTHENED = 100.0  # most that a step is lengthened once α is known, however small its KL is measured
REPRESENTABLE = 1e-3  # a rate at which a step is not lost in the rounding of the parameters
ROUNDING = -1e-9  # nats; an estimate may be negative by its rounding, not by more


@dataclass(frozen=True)
class Schedule:
    """How the budget changes over the training.

    Attributes:
        shape: `constant`, `linear` (to 0) or `cosine2` (the square of a cosine, to 0).
        total_steps: of the training; needed unless the shape is constant.
        warmup_steps: the first so many budgets grow to the full one, as those of a linear warm-up of the rate would.

    Raises:
        ValueError: an unknown shape, or one without the number of steps that it needs.
    """

    shape: str = "constant"
    total_steps: int | None = None
    warmup_steps: int = 0

    def __post_init__(self):
        """Check the fields."""
        if self.shape not in SHAPES:
            raise ValueError(f"schedule must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if self.shape != "constant" and not self.total_steps:
            raise ValueError(f"schedule={self.shape} needs total_steps")

    def factor(self, step: int) -> float:
        """In (0, 1], what multiplies the budget after `step` steps."""
        done = min(1.0, step / self.total_steps) if self.total_steps else 0.0
        warm = min(1.0, (step + 1) / self.warmup_steps) ** 2 if self.warmup_steps else 1.0
        return max(SHAPES[self.shape](done) * warm, SMALLEST)


@dataclass(frozen=True)
class Taken:
    """What became of a step.

    Attributes:
        kl: of the step that was taken, in nats; 0 if it was taken back.
        nats: the budget of this step.
        alpha: its learning rate, of the parameter group with the largest; 0 if it was taken back.
        passes: measurements that it took.
        taken_back: the step was not taken, as its KL did not fit or was not finite.
    """

    kl: float
    nats: float
    alpha: float
    passes: int
    taken_back: bool = False


class KLBudget:
    """Takes an optimizer's steps within a budget of KL.

    Args:
        optimizer: Adam, AdamW, SGD, or any other whose trained parameters are small enough to copy; an accelerate
            wrapper is looked through.
        nats: mean KL(π_old ‖ π_new) a token of a step, in nats; a number given to `step` overrides it.
        entropy_share: instead of `nats`, κ: the budget is κ times the policy's entropy, which is given to `step`.
        rule: `target` or `verify`.
        tolerance: > 1; a step's KL may exceed the budget by this factor.
        max_passes: measurements of a step, at least 1.
        schedule: of the budget; constant by default.
        copy_bytes: largest copy of parameters, for an optimizer that needs one.

    Raises:
        ValueError: an argument out of range, or an optimizer whose step cannot be pulled back.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        nats: float | None = None,
        *,
        entropy_share: float | None = None,
        rule: str = "target",
        tolerance: float = 1.5,
        max_passes: int = 8,
        schedule: Schedule = Schedule(),
        copy_bytes: int = COPY_BYTES,
    ):
        if (nats is None) == (entropy_share is None):
            raise ValueError("give either nats or entropy_share")
        for name, value in (("nats", nats), ("entropy_share", entropy_share)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if not tolerance > 1:
            raise ValueError(f"tolerance must be greater than 1, got {tolerance}")
        if max_passes < 1:
            raise ValueError(f"max_passes must be at least 1, got {max_passes}")
        self.optimizer = _unwrapped(optimizer)
        self.line = line_of(self.optimizer, copy_bytes)
        self.nats, self.entropy_share, self.rule = nats, entropy_share, rule
        self.tolerance, self.max_passes = tolerance, max_passes
        self.schedule = schedule
        self.alpha = SMALLEST  # of the next step, under `target`
        self.steps = self.taken_back = 0
        self._last_nats: float | None = None
        self._scheduled: list[Any] = []
        self._begun = self._takes = self._signal = False  # of the coming step
        self._start = 1.0  # where on its line the first measurement is made

    def budget(self, nats: float | None = None, entropy: float | None = None) -> float:
        """The coming step's budget in nats.

        Args:
            nats: overrides the constant one.
            entropy: mean entropy of the policy at the step's tokens, in nats; for `entropy_share`.

        Raises:
            ValueError: a budget that is not positive, or an `entropy_share` without an entropy.
        """
        if nats is None:
            nats = self.nats
        if nats is None:
            if entropy is None:
                raise ValueError("entropy_share needs the entropy of the step's tokens: step(measure, entropy=…)")
            nats = self.entropy_share * entropy
        if not nats > 0:
            raise ValueError(f"the budget of a step must be greater than 0 nats, got {nats}")
        return nats * self.schedule.factor(self.steps)

    def step(self, measure: Callable[[], float], nats: float | None = None, entropy: float | None = None) -> Taken:
        """Take the optimizer's step within the budget; in place of `optimizer.step()`.

        Args:
            measure: the mean KL(π_old ‖ π_now) of the step's own tokens in nats, of the parameters as they are when
                it is called; the same number in every process.
            nats: this step's budget instead of the constant one.
            entropy: see `budget`.

        Returns:
            What became of the step.

        Raises:
            ValueError: a budget that is not positive, or a measurement that is no KL.
        """
        budget = self.budget(nats, entropy)
        if self.begin(budget):
            self.optimizer.step()
        return self.settle(measure, budget)

    def begin(self, nats: float) -> bool:
        """Prepare the coming `optimizer.step()`, for trainers that call it themselves.

        Args:
            nats: the step's budget, from `budget`.

        Returns:
            Whether the step may be taken: not if a gradient is not finite, which would spoil the optimizer's moments.
        """
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        sums = torch.stack([g.detach().abs().sum() for g in gradients]) if gradients else torch.zeros(1)
        self._begun, self._takes, self._signal = True, bool(sums.isfinite().all()), bool((sums > 0).any())
        if not self._takes:
            return False
        self._scheduled = [group["lr"] for group in groups]
        if self.rule == "target":
            # the budget has changed since α filled one: so has the step that fills it
            change = math.sqrt(nats / self._last_nats) if self._last_nats else 1.0
            alpha = self.alpha * min(STRETCH, max(1 / STRETCH, change))
            largest = max(float(lr) for lr in self._scheduled)
            # a copy knows the direction by the difference that the step makes: it must not be rounded away
            rate = max(alpha, REPRESENTABLE) if isinstance(self.line, CopiedLine) else alpha
            self._start = alpha / rate
            for group, lr in zip(groups, self._scheduled, strict=True):
                group["lr"] = rate * (float(lr) / largest if largest else 1.0)
        self.line.begin()
        return True

    def settle(self, measure: Callable[[], float], nats: float, signal: bool | None = None) -> Taken:
        """Measure the step that has been taken, and move along it until its KL fits; after `begin`, whatever it said.

        Args:
            measure: as in `step`.
            nats: as in `begin`.
            signal: whether any process had a gradient other than zero, where each has a shard of it; by default what
                `begin` saw here, and processes that differ in it would measure a different number of times.

        Returns:
            What became of the step; the scheduled learning rates are restored.

        Raises:
            ValueError: `begin` was not called, or a measurement that is no KL.
        """
        if not self._begun:
            raise ValueError("settle() without begin(): the optimizer has taken its step by itself, unbounded")
        self._begun = False
        if signal is not None:
            self._signal = signal
        if not self._takes:
            return self._record(Taken(0.0, nats, 0.0, 0, taken_back=True))
        rate = max(float(group["lr"]) for group in self.optimizer.param_groups)
        s, low, high = self._start, None, None  # (s, KL) of the longest step that fits, and the shortest that does not
        if s != 1:
            self.line.move(s)
        longest = s * (LENGTHENED if self._last_nats else math.inf)
        kl = math.nan
        for passes in range(1, self.max_passes + 1):
            kl = self._measured(measure)
            if kl <= self.tolerance * nats:
                low = (s, kl)
            else:
                high = (s, kl)
            following = min(_next_length(nats, low, high), longest)
            if self._fits(kl, nats) or passes == self.max_passes or following == s:
                break
            s = following
            self.line.move(s)
        fits = kl <= self.tolerance * nats
        if not fits and low:  # the longest step that fits is on the way back
            s, kl = low
            self.line.move(s)
        elif not fits:
            s, kl = 0.0, 0.0
            self.line.move(s)
        for group, lr in zip(self.optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = lr
        if self.rule == "target" and (self._signal or high):
            self.alpha = rate * s if s else rate * self._start / STRETCH
            self._last_nats = nats
        return self._record(Taken(kl, nats, rate * s, passes, taken_back=s == 0))

    def _fits(self, kl: float, nats: float) -> bool:
        lengthens = self.rule == "target" and self._signal
        return kl <= self.tolerance * nats and (not lengthens or kl >= nats / self.tolerance)

    def skip(self) -> None:
        """Count an update that is not taken at all, so that the schedule goes on."""
        self.steps += 1

    @staticmethod
    def _measured(measure: Callable[[], float]) -> float:
        value = measure()
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(
                f"measure() must return one number, the mean KL in nats, got a {tuple(value.shape)} tensor"
            )
        kl = float(value)
        if kl < ROUNDING:
            raise ValueError(f"measure() returned {kl:.3g} nats: a KL divergence is not negative")
        return max(kl, 0.0) if not math.isnan(kl) else math.inf

    def _record(self, taken: Taken) -> Taken:
        self.steps += 1
        self.taken_back += taken.taken_back
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs to know of the earlier ones; plain numbers."""
        return {
            "alpha": self.alpha,
            "steps": self.steps,
            "taken_back": self.taken_back,
            "last_nats": self._last_nats,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.alpha, self.steps, self.taken_back = state["alpha"], state["steps"], state["taken_back"]
        self._last_nats = state["last_nats"]


def _next_length(nats: float, low: tuple[float, float] | None, high: tuple[float, float] | None) -> float:
    """Where on the line the KL will be `nats`, from the nearest measurements on either side of it.

    With one measurement, KL ∝ s²; with two, the power law through both.
    """
    s, kl = high or low
    power = 2.0
    if low and high and 0 < low[1] < high[1] < math.inf:
        power = min(8.0, max(0.5, math.log(high[1] / low[1]) / math.log(high[0] / low[0])))
    ratio = (nats / kl) ** (1 / power) if kl else math.inf
    s = s * min(STRETCH, max(1 / STRETCH, ratio))
    if low and high:  # stay inside the bracket
        s = min(max(s, low[0]), high[0])
        if s in (low[0], high[0]):
            s = math.sqrt(low[0] * high[0])
    return s


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper; ValueError for one that steps inside the backward pass."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        if "deepspeed" in type(optimizer).__module__.lower():
            raise ValueError(
                "DeepSpeed takes its step inside the backward pass, where it cannot be measured: use FSDP"
            )
        if not hasattr(optimizer, "optimizer"):
            raise ValueError(f"expected a torch optimizer, got {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer
