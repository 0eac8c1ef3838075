"""Plan the whole step: shorten the learning rate so that the update's predicted KL stays within a budget.

After the commit, the optimizer model knows the last layer's next step D. Its policy shift over the batch,
m_F(batch) = ½ α² mean_i Var_{π_i}(D x_i) (Eq. 6 with the exact Fisher), predicts the KL of the update, and the step
is taken with α' = α · min(1, √(δ_step / (c · m_F))). The paper uses this prediction to choose data only; here it
chooses the length of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RATE = 0.3  # weight of the newest measurement in the running log-average
LIMIT = math.log(1e3)  # the calibration stays within 1e±3
FLOOR = 1e-6  # nats; below, a measured KL is rounding of float32 log-probabilities


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
