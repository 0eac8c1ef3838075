"""Step rules: how long the whole step may be, decided before it is taken.

| rule (`capo.step_rule`) | the coming step's rate | source |
|---|---|---|
| `plan` | α · min(1, √(δ_step / (c · m_F(batch)))): within a budget of predicted KL | ours, from Eq. 6 |
| `adapt` | α · s, with s from the measured KL of the steps before | after arXiv 1707.06347, §4 |
| `length` | α · s, with s halved when completions grow | after arXiv 2602.01826 |

After the commit, the optimizer model knows the last layer's next step D. Its policy shift over the batch,
m_F(batch) = ½ α² mean_i Var_{π_i}(D x_i) (Eq. 6 with the exact Fisher), predicts the KL of the update. The paper uses
this prediction to choose data only; `plan` chooses the length of the step with it. `adapt`, `length` and `NormGuard`
are what one would do without a prediction: follow the KL of earlier steps, take longer completions for a warning, and
skip an update with an unusually large gradient.

A rule is a dataclass whose fields are its settings, named as in the group `capo` of a recipe, and its state, which no
recipe sets (`STATE`). To add one: write its class, name it in `STEP_RULES`, and give it a file in `recipes/budget/`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, fields
from typing import ClassVar

RATE = 0.3  # weight of the newest measurement in the running log-average
LIMIT = math.log(1e3)  # the calibration stays within 1e±3
FLOOR = 1e-6  # nats; below, a measured KL is rounding of float32 log-probabilities
STRIDE = 1.5  # PPO's adaptive KL coefficient (arXiv 1707.06347, §4) doubles; a rate needs a gentler hand
STATE = ("calibration", "usual_length")  # fields that a step rule learns
WINDOW, WARM = 32, 5  # norms that the guard remembers, and how many it wants before it skips anything


@dataclass
class StepRule:
    """Keep the predicted KL of each update within a budget, by a shorter step.

    Attributes:
        step_policy_shift: δ_step in nats; inf leaves every step alone.
        step_feedback: multiply the prediction by the running ratio c of measured to predicted KL.
        calibration: c, from 1.
    """

    name: ClassVar[str] = "plan"
    predicts: ClassVar[bool] = True  # relies on the optimizer model being that of the real optimizer
    step_policy_shift: float = math.inf
    step_feedback: bool = True
    calibration: float = 1.0

    def __post_init__(self):
        """Check the range; ValueError."""
        if not self.step_policy_shift > 0:
            raise ValueError(f"step_policy_shift must be greater than 0, got {self.step_policy_shift}")

    @property
    def acts(self) -> bool:
        """Whether a step may be shortened."""
        return math.isfinite(self.step_policy_shift)

    @property
    def learns(self) -> bool:
        """Whether the rule needs the measured KL of the steps."""
        return self.acts and self.step_feedback

    def factor(self, predicted_kl: float) -> float:
        """Factor in (0, 1] for this step's learning rate, given m_F(batch) at the scheduled rate, in nats."""
        expected = predicted_kl * (self.calibration if self.step_feedback else 1.0)
        if not expected > self.step_policy_shift:
            return 1.0
        return math.sqrt(self.step_policy_shift / expected)

    def foresee(self, length: float) -> None:
        """Learn, before a step, the mean length of its completions in tokens; here nothing."""

    def observe(self, measured_kl: float, predicted_kl: float) -> None:
        """Learn from a step that was taken: its measured KL, and m_F(batch) at the rate it was taken with."""
        if not (0 <= measured_kl < math.inf and FLOOR < predicted_kl < math.inf):
            return  # a step of almost no length says nothing
        if measured_kl < FLOOR:  # it is at most the floor, which says something if more is expected
            if self.calibration * predicted_kl <= FLOOR:
                return
            measured_kl = FLOOR
        log_c = (1 - RATE) * math.log(self.calibration) + RATE * (math.log(measured_kl) - math.log(predicted_kl))
        self.calibration = math.exp(min(LIMIT, max(-LIMIT, log_c)))


@dataclass
class AdaptedRate(StepRule):
    """Let the rate follow the measured KL of the step before.

    Nothing is predicted, so the first steps are unprotected by design, and so is any step that is much longer than
    the one before.

    Attributes:
        step_policy_shift: the KL of an update to aim at, in nats; a target and no bound.
        calibration: s in (0, 1].
    """

    name: ClassVar[str] = "adapt"
    predicts: ClassVar[bool] = False
    step_feedback: bool = field(default=True, init=False)

    def __post_init__(self):
        """Check that there is a target."""
        super().__post_init__()
        if not self.acts:
            raise ValueError("step_rule=adapt needs a KL to aim at: set capo.step_policy_shift")

    def factor(self, predicted_kl: float) -> float:
        """Factor in (0, 1] for this step's learning rate, whatever is predicted."""
        return self.calibration

    def observe(self, measured_kl: float, predicted_kl: float) -> None:
        """Shorten the next step by 1.5 after a KL above twice the target, lengthen it after one below half of it."""
        if not measured_kl <= 2 * self.step_policy_shift:  # also NaN
            self.calibration /= STRIDE
        elif measured_kl < self.step_policy_shift / 2:
            self.calibration = min(1.0, self.calibration * STRIDE)


@dataclass
class LengthDecay(StepRule):
    """Halve the rate, for good, when completions are longer than they used to be.

    In the form of SkyRL's pull request 1448: the usual length is a running mean, which starts anew after each decay.

    Attributes:
        length_ratio: > 1; the completions of a step are longer than usual if their mean length exceeds this many times
            the running mean.
        calibration: s in (0, 1].
        usual_length: the running mean, in tokens; 0 before the first step.
    """

    name: ClassVar[str] = "length"
    predicts: ClassVar[bool] = False
    step_policy_shift: float = field(default=math.inf, init=False)
    step_feedback: bool = field(default=False, init=False)
    length_ratio: float = 1.2
    usual_length: float = field(default=0.0, init=False)

    def __post_init__(self):
        """Check the range; ValueError."""
        if not self.length_ratio > 1:
            raise ValueError(f"length_ratio must be greater than 1, got {self.length_ratio}")

    @property
    def acts(self) -> bool:
        """Whether a step may be shortened."""
        return True

    def factor(self, predicted_kl: float) -> float:
        """Factor in (0, 1] for this step's learning rate, whatever is predicted."""
        return self.calibration

    def foresee(self, length: float) -> None:
        """Compare the length of this step's completions with the usual one, in tokens."""
        if self.usual_length and length > self.length_ratio * self.usual_length:
            self.calibration /= 2
            self.usual_length = length
        weight = 0.1 if self.usual_length else 1.0
        self.usual_length += weight * (length - self.usual_length)


STEP_RULES: dict[str, type[StepRule]] = {rule.name: rule for rule in (StepRule, AdaptedRate, LengthDecay)}


def step_settings(rule: type[StepRule]) -> tuple[str, ...]:
    """The names of a step rule's settings."""
    return tuple(one.name for one in fields(rule) if one.init and one.name not in STATE)


@dataclass
class NormGuard:
    """Skip an update whose gradient is far larger than usual.

    Usual is the median norm of the last 32 updates that had a gradient. Skipped ones are among them, so that a norm
    that has grown for good stops no training; the first 5 are never skipped.

    Attributes:
        skip_gradient_norm: κ > 1; an update is skipped if its norm exceeds κ times the median; inf is off.
        norms: of the updates so far, the newest last.
    """

    skip_gradient_norm: float = math.inf
    norms: list[float] = field(default_factory=list)

    def __post_init__(self):
        """Check the range; ValueError."""
        if not self.skip_gradient_norm > 1:
            raise ValueError(f"skip_gradient_norm must be greater than 1, got {self.skip_gradient_norm}")

    def skips(self, norm: float) -> bool:
        """Whether to skip an update with this gradient norm; it is remembered, once, whatever the answer."""
        skip = len(self.norms) >= WARM and norm > self.skip_gradient_norm * statistics.median(self.norms)
        if 0 < norm < math.inf:  # a batch of equal rewards has no gradient, which is not a small one
            self.norms = [*self.norms, norm][-WINDOW:]
        return skip
