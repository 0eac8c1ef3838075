"""How long the whole step may be: planned before it is taken, or learnt from the steps before, or not taken at all.

`StepBudget` shortens the learning rate so that the update's predicted KL stays within a budget.

After the commit, the optimizer model knows the last layer's next step D. Its policy shift over the batch,
m_F(batch) = ½ α² mean_i Var_{π_i}(D x_i) (Eq. 6 with the exact Fisher), predicts the KL of the update, and the step
is taken with α' = α · min(1, √(δ_step / (c · m_F))). The paper uses this prediction to choose data only; here it
chooses the length of the step.

`AdaptedRate` and `NormGuard` are what one would do without a prediction: follow the KL of the steps before, and skip
an update whose gradient is far larger than usual.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

RATE = 0.3  # weight of the newest measurement in the running log-average
LIMIT = math.log(1e3)  # the calibration stays within 1e±3
FLOOR = 1e-6  # nats; below, a measured KL is rounding of float32 log-probabilities
STRIDE = 1.5  # PPO's adaptive KL coefficient (arXiv 1707.06347, §4) doubles; a rate needs a gentler hand
WINDOW, WARM = 32, 5  # norms that the guard remembers, and how many it wants before it skips anything


@dataclass
class StepBudget:
    """A budget of KL per update.

    Attributes:
        max_policy_shift: δ_step in nats; inf leaves every step alone.
        feedback: multiply the prediction by the running ratio c of measured to predicted KL.
        calibration: c, from 1.
    """

    max_policy_shift: float = math.inf
    feedback: bool = True
    calibration: float = 1.0

    def scale(self, predicted_kl: float) -> float:
        """Factor in (0, 1] for this step's learning rate, given m_F(batch) at the scheduled rate, in nats."""
        expected = predicted_kl * (self.calibration if self.feedback else 1.0)
        if not expected > self.max_policy_shift:
            return 1.0
        return math.sqrt(self.max_policy_shift / expected)

    def calibrate(self, measured_kl: float, predicted_kl: float) -> None:
        """Update c with a step that was taken: its measured KL and m_F(batch) at the rate it was taken with."""
        if not (FLOOR < measured_kl < math.inf and FLOOR < predicted_kl < math.inf):
            return  # a step of almost no length says nothing
        log_c = (1 - RATE) * math.log(self.calibration) + RATE * (math.log(measured_kl) - math.log(predicted_kl))
        self.calibration = math.exp(min(LIMIT, max(-LIMIT, log_c)))


@dataclass
class AdaptedRate:
    """A learning rate that follows the measured KL of the step before: after PPO's adaptive KL (arXiv 1707.06347, §4).

    The rate is the schedule's times s. Nothing is predicted, so the first steps are unprotected by design, and so is
    any step that is much longer than the one before.

    Attributes:
        target: the KL of an update to aim at, in nats.
        calibration: s in (0, 1].
    """

    target: float
    calibration: float = 1.0

    def scale(self, predicted_kl: float) -> float:
        """Factor in (0, 1] for this step's learning rate, whatever m_F(batch) predicts."""
        return self.calibration

    def calibrate(self, measured_kl: float, predicted_kl: float) -> None:
        """Shorten the next step by 1.5 after a KL above twice the target, lengthen it after one below half of it."""
        if not measured_kl <= 2 * self.target:  # also NaN
            self.calibration /= STRIDE
        elif measured_kl < self.target / 2:
            self.calibration = min(1.0, self.calibration * STRIDE)


@dataclass
class NormGuard:
    """Skips an update whose gradient is far larger than usual.

    Usual is the median norm of the last 32 updates that had a gradient. Skipped ones are among them, so that a norm
    that has grown for good stops no training; the first 5 are never skipped.

    Attributes:
        factor: κ; an update is skipped if its norm exceeds κ times the median; inf is off.
        norms: of the updates so far, the newest last.
    """

    factor: float = math.inf
    norms: list[float] = field(default_factory=list)

    def skips(self, norm: float) -> bool:
        """Whether to skip an update with this gradient norm; it is remembered, once, whatever the answer."""
        skip = len(self.norms) >= WARM and norm > self.factor * statistics.median(self.norms)
        if 0 < norm < math.inf:  # a batch of equal rewards has no gradient, which is not a small one
            self.norms = [*self.norms, norm][-WINDOW:]
        return skip
