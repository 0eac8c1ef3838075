"""The group `budget` of a recipe: each step is measured, and kept within a budget of KL (`open_r1_capo.budget`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from open_r1_capo.settings.values import at_least

RULES = ("none", "target", "verify")
SCHEDULES = ("constant", "linear", "cosine2")


@dataclass
class BudgetConfig:
    """How long a step may be."""

    # `target`: no learning rate, each step fills its budget; `verify`: the scheduled rate, pulled back to the budget
    rule: str = "none"
    nats: float | None = None  # mean KL(π_old ‖ π_new) a token of a step
    # κ, instead of nats: the budget is κ times the policy's entropy at the step's tokens
    entropy_share: float | None = None
    schedule: str = "constant"  # of the budget over the run: constant, linear or cosine2
    warmup_steps: int = 0  # the first steps, over which the budget grows to the full one
    share: float = 1.0  # of each micro-batch's sequences that are measured, in (0, 1]
    tolerance: float = 1.5  # > 1: a step's KL may exceed its budget by this factor
    max_passes: int = 8  # measurements of a step

    def __post_init__(self):
        """Check choices and ranges; raises ValueError."""
        for name, known in (("rule", RULES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.on and self.nats is None and self.entropy_share is None:
            raise ValueError(f"rule={self.rule} needs either budget.nats or budget.entropy_share")
        if self.on and self.nats is not None and self.entropy_share is not None:
            raise ValueError(
                "nats and budget.entropy_share are both set: add budget.entropy_share=null, or leave nats out"
            )
        for name in ("nats", "entropy_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        if not self.tolerance > 1:
            raise ValueError(f"tolerance must be greater than 1, got {self.tolerance}")
        at_least(1, max_passes=self.max_passes)
        at_least(0, warmup_steps=self.warmup_steps)

    @property
    def on(self) -> bool:
        """Whether steps are measured and moved."""
        return self.rule != "none"


def default_accelerator(settings: Mapping[str, Any]) -> str:
    """The accelerate configuration of a composed recipe on GPUs: ZeRO-2 keeps float32 weights for Adam.

    It steps inside the backward pass, where no KL budget can act: there FSDP.
    """
    return "zero2" if (settings.get("budget") or {}).get("rule", "none") == "none" else "fsdp"
