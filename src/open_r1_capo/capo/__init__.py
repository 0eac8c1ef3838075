"""CAPO (arXiv 2510.00819) in torch alone: how far would each token move the policy and the objective?

Shape suffixes: N tokens, K support, D hidden width, V vocabulary, R touched vocabulary rows.

| paper | function |
|---|---|
| last-layer model, token gradient A·v⊗x (Eq. 7) | `last_layer.TokenBatch`, `last_layer.row_gradient` |
| optimizer model Δψ = α·D (§4.1) and z = D x (App. D) | `SGDStep.propose`, `AdamStep.propose` |
| moments of the accepted tokens (Alg. 1) | `AdamStep.commit` |
| Fisher curvature (Eq. 57, 58) | `fisher` |
| Hessian curvature (Eq. 62, 63) | `hessian` |
| policy shift m_F, objective shift m_H (Eq. 10) | `policy_shift`, `objective_shift` |
| acceptance test (Eq. 11) | `Mask.judge` → `TokenSelection` |
| the whole step's KL, before it is taken (Eq. 6) | `AdamStep.planned`, `curvature.predicted_kl` |

One token, by hand:

    >>> import torch
    >>> from open_r1_capo.capo import Mask, SGDStep, TokenBatch, objective_shift, policy_shift
    >>> batch = TokenBatch(
    ...     features=torch.tensor([[1.0, 2.0]]), token_ids=torch.tensor([[3, 5]]),
    ...     probs=torch.tensor([[0.8, 0.2]]), action_index=torch.tensor([1]), advantages=torch.tensor([1.0]))
    >>> z = SGDStep().propose(batch)  # A ‖x‖² v, with v = (-0.8, 0.8)
    >>> round(policy_shift(batch, z, lr=0.1).item(), 4)  # ½ · 0.1² · (5 · 1.28)²
    0.2048
    >>> Mask(max_policy_shift=0.1).judge(policy_shift(batch, z, 0.1), objective_shift(batch, z, 0.1)).weight
    tensor([0.])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_r1_capo.capo.curvature import fisher, hessian, objective_shift, policy_shift
    from open_r1_capo.capo.last_layer import TokenBatch
    from open_r1_capo.capo.rules import Mask, Scale
    from open_r1_capo.capo.selection import TokenSelection
    from open_r1_capo.capo.steps import AdamStep, SGDStep

PLACES = {
    "curvature": ("fisher", "hessian", "objective_shift", "policy_shift"),
    "last_layer": ("TokenBatch",),
    "rules": ("Mask", "Scale"),
    "selection": ("TokenSelection",),
    "steps": ("AdamStep", "SGDStep"),
}
__all__ = [
    "AdamStep",
    "Mask",
    "SGDStep",
    "Scale",
    "TokenBatch",
    "TokenSelection",
    "fisher",
    "hessian",
    "objective_shift",
    "policy_shift",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: settings read the rules' fields without torch."""
    for module, names in PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
