"""How far the sampler's log-probabilities are from the trainer's: logged at every step that has fresh completions."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

NAME = "sampling/sampling_logp_difference"  # TRL's, which logs it with its importance sampling correction alone


class SamplingComparison:
    """Collects the differences of a step's micro-batches."""

    def __init__(self):
        self._inputs: dict[str, Any] | None = None
        self._found: list[Tensor] = []

    def expect(self, inputs: dict[str, Any] | None) -> None:
        """The micro-batch whose log-probabilities come next; None if they are not to be compared."""
        self._inputs = inputs if inputs and "sampling_per_token_logps" in inputs else None

    def see(self, logps: Tensor) -> None:
        """Compare the trainer's log-probabilities (B, T), at the sampling temperature, with the sampler's."""
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            return
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        difference = (logps.detach().float() - inputs["sampling_per_token_logps"].float())[mask].abs()
        self._found.append(difference[~difference.isnan()].cpu())  # NaN: a token that the sampler could not score

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """The comparison of the step over all ranks, for the log; empty without one."""
        if not self._found:
            return {}
        mine = torch.cat(self._found)
        self._found.clear()
        largest = mine.max() if len(mine) else torch.zeros(())
        row = torch.stack([mine.double().sum(), torch.tensor(float(len(mine)), dtype=torch.float64), largest.double()])
        rows = accelerator.gather(row[None].to(accelerator.device, torch.float32)).cpu()
        total, count, largest = rows[:, 0].sum(), rows[:, 1].sum(), rows[:, 2].max()
        return {f"{NAME}/mean": float(total / count.clamp(min=1)), f"{NAME}/max": float(largest)}
