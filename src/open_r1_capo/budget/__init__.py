"""How long a whole step may be, in nats of KL. torch only.

`KLBudget` measures each step and keeps it within a budget; `rules.py` has the rules that decide before the step is
taken. Names are imported on first use: settings read the rules' fields without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_r1_capo.budget.kl import Estimate, sampled_kl
    from open_r1_capo.budget.kl_budget import KLBudget, Schedule, Taken

PLACES = {"kl": ("Estimate", "sampled_kl"), "kl_budget": ("KLBudget", "Schedule", "Taken")}
__all__ = ["Estimate", "KLBudget", "Schedule", "Taken", "sampled_kl"]


def __getattr__(name: str) -> Any:
    for module, names in PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
