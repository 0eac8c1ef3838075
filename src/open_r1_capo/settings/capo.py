"""CAPO's own settings, `capo.*` of a recipe: what the trainer does with each token, and with the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from open_r1_capo.capo import TrustRegion
from open_r1_capo.capo.last_layer import GRANULARITIES


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message is one sentence for the user."""


@dataclass
class CAPOConfig:
    """What CAPO does; every threshold is in the units of Eq. 10 at the scheduler's current learning rate.

    Attributes:
        mode: `off` (plain TRL), `observe` (log every shift, weigh every token 1), `mask` (the paper), `scale`, or a
            rival of `capo.rivals` in their place: `probability`, `covariance`, `gradient_norm`.
        optimizer_model: `adam` or `sgd` (App. I), the model of the step.
        top_k: k of the support; the sampled token is always added.
        max_policy_shift: δ_F; inf is off.
        max_objective_shift: δ_H^high; inf is off.
        min_objective_shift: δ_H; null is the symmetric form of App. J.
        granularity: what is judged: token, sequence, group or batch (within one micro-batch of one rank).
        denominator: GRPO divides a sequence by its `kept` tokens, or by `all`.
        moment_average: `per_logit` or `per_token`, see `AdamStep`.
        absent_rows: `hold` or `decay`, see `AdamStep`.
        step_policy_shift: δ_step, the KL budget of a whole update; inf is off.
        step_rule: `plan` keeps each update within the budget, before it is taken; `adapt` makes the budget a target,
            which the rate follows by the KLs that were measured.
        step_feedback: calibrate the prediction by the measured KL.
        measure_kl: share of each micro-batch's sequences on which the update's true KL is measured; 0 is off.
        probability_alpha: α of mode `probability`.
        covariance_frac: share of tokens that mode `covariance` leaves out.
        covariance_low: a token may be left out if its covariance is above.
        covariance_high: and below.
        max_token_gradient: c of mode `gradient_norm`; inf is off.
        skip_gradient_norm: κ; an update is skipped if its gradient norm exceeds κ × the median; inf is off.
    """

    mode: str = "mask"
    optimizer_model: str = "adam"
    top_k: int = 50
    max_policy_shift: float = math.inf
    max_objective_shift: float = math.inf
    min_objective_shift: float | None = None
    granularity: str = "token"
    denominator: str = "kept"
    moment_average: str = "per_logit"
    absent_rows: str = "hold"
    step_policy_shift: float = math.inf
    step_rule: str = "plan"
    step_feedback: bool = True
    measure_kl: float = 1.0
    probability_alpha: float = 0.3
    covariance_frac: float = 2e-4
    covariance_low: float = 1.0
    covariance_high: float = 5.0
    max_token_gradient: float = math.inf
    skip_gradient_norm: float = math.inf

    RIVALS: ClassVar[tuple[str, ...]] = ("probability", "covariance", "gradient_norm")
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "mode": ("off", "observe", "mask", "scale", *RIVALS),
        "optimizer_model": ("adam", "sgd"),
        "granularity": GRANULARITIES,
        "denominator": ("kept", "all"),
        "moment_average": ("per_logit", "per_token"),
        "absent_rows": ("hold", "decay"),
        "step_rule": ("plan", "adapt"),
    }

    def __post_init__(self):
        """Check choices and ranges.

        Raises:
            ConfigError: naming the key, its value and what it may be.
        """
        for name, known in self.CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"capo.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self._check_ranges()
        self._check_step()
        try:
            self.trust_region()
        except ValueError as error:
            raise ConfigError(f"capo.{error}") from None

    def _check_ranges(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"capo.top_k must be at least 1, got {self.top_k}")
        for name in ("measure_kl", "probability_alpha", "covariance_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"capo.{name} is a share between 0 and 1, got {getattr(self, name)}")
        for name, low in {"step_policy_shift": 0, "max_token_gradient": 0, "skip_gradient_norm": 1}.items():
            if not getattr(self, name) > low:
                raise ConfigError(f"capo.{name} must be greater than {low}, got {getattr(self, name)}")
        if not self.covariance_low < self.covariance_high:
            raise ConfigError(
                f"capo.covariance_low must be below capo.covariance_high ({self.covariance_high}), got "
                f"{self.covariance_low}"
            )

    def _check_step(self) -> None:
        if self.step_rule == "adapt":
            if not self.plans_steps:
                raise ConfigError("capo.step_rule=adapt needs a KL to aim at: set capo.step_policy_shift")
            if self.measure_kl == 0:
                raise ConfigError("capo.step_rule=adapt follows the measured KL: set capo.measure_kl above 0")
            return
        if self.plans_steps and self.optimizer_model == "adam" and self.absent_rows == "hold":
            raise ConfigError(
                "capo.step_policy_shift plans the step of the real, dense Adam, which moves every row: it needs "
                "capo.absent_rows=decay"
            )
        if self.plans_steps and self.step_feedback and self.measure_kl == 0:
            raise ConfigError(
                "capo.step_feedback needs the measured KL: set capo.measure_kl above 0 (1 is every token)"
            )

    @property
    def weighs(self) -> bool:
        """Whether a token's gradient may be changed."""
        return self.mode not in ("off", "observe")

    @property
    def plans_steps(self) -> bool:
        """Whether the step's learning rate may be shortened."""
        return math.isfinite(self.step_policy_shift)

    def trust_region(self) -> TrustRegion:
        """The bounds of Eq. 11, as configured; a rival has none."""
        if self.mode in self.RIVALS:
            return TrustRegion(math.inf)
        mode = "scale" if self.mode == "scale" else "mask"
        return TrustRegion(self.max_policy_shift, self.max_objective_shift, self.min_objective_shift, mode)
