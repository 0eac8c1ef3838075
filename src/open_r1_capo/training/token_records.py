"""Write token records (`runs/records.py`): what became of every token of a few steps of a run."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from open_r1_capo.capo.selection import TokenSelection
from open_r1_capo.runs.records import NOTABLE, REASONS, read_record
from open_r1_capo.training.measure import Measured
from open_r1_capo.training.update import MicroBatch


class TokenRecords:
    """The records of one run: the first step, the one with most weight taken away and the one with the largest KL.

    If the first step has learning rate 0 (warm-up), it is replaced by the first step with another.

    Args:
        folder: <run>/tokens, created when the first record is written.
        keep: `notable`, or `all` for a file of every step.
        tokenizer: turns ids into text.
    """

    def __init__(self, folder: Path, keep: str, tokenizer: PreTrainedTokenizerBase):
        self.folder, self.keep, self.tokenizer = folder, keep, tokenizer
        self.best: dict[str, float] = {}

    def resume(self, step: int) -> None:
        """Delete the records of steps after `step`: they will be written again."""
        self.best = {}
        for path in self.folder.glob("*.part"):  # a write was cut off
            path.unlink()
        for path in self.folder.glob("*.json.gz"):
            try:
                record = read_record(path)
                stays = record["step"] <= step
            except ValueError:  # it was cut off or damaged
                stays = False
            if not stays:
                path.unlink()
                continue
            name = path.name.removesuffix(".json.gz")
            self.best[name] = record.get(NOTABLE.get(name)) or 0.0

    def offer(
        self, whole: dict[str, Any], micro_batches: Sequence[MicroBatch], found: Sequence[Measured | None]
    ) -> None:
        """Keep a step if it is notable; the record is built for such a step only.

        `whole` holds `step`, `lr`, `taken_lr` and `measured_kl` (None if it was not measured).
        """
        lost = 1 - float(torch.cat([one.in_step.weight for one in micro_batches]).mean())
        numbers = {key: value if key == "step" else _number(value) for key, value in whole.items()}
        numbers["rejected"] = _number(lost)
        names = [f"step{whole['step']}"] if self.keep == "all" else self._beaten(numbers)
        if not names:
            return
        completions = [c for pair in zip(micro_batches, found, strict=True) for c in self._completions(*pair)]
        content = gzip.compress(json.dumps(numbers | {"completions": completions}).encode(), 6, mtime=0)
        self.folder.mkdir(exist_ok=True)
        for name in names:
            part = self.folder / f"{name}.json.gz.part"
            part.write_bytes(content)
            os.replace(part, self.folder / f"{name}.json.gz")

    def _beaten(self, numbers: dict[str, Any]) -> list[str]:
        """The names of the notable records that a step takes over; remembered at once."""
        new = {name: numbers[key] for name, key in NOTABLE.items() if (numbers[key] or 0) > self.best.get(name, 0)}
        if "first" not in self.best:
            new["first"] = numbers["taken_lr"]  # 0 in a warm-up's first step, which then gives way to the second
        elif self.best["first"]:
            new.pop("first", None)
        self.best |= new
        return list(new)

    def _completions(self, micro_batch: MicroBatch, found: Measured | None) -> list[dict[str, Any]]:
        """The completions of a micro-batch, in its order."""
        columns = _columns(micro_batch, found)
        lengths, (batch, width) = micro_batch.mask.sum(1).tolist(), micro_batch.mask.shape
        lists = {name: [_numbers(values) for values in column.split(lengths)] for name, column in columns.items()}
        measured = [False] * batch if found is None else [bool(rows.any()) for rows in found.chosen.split(lengths)]
        completions, attended = [], micro_batch.attention_mask.bool()
        for i, length in enumerate(lengths):
            ids = micro_batch.input_ids[i, -width:][micro_batch.mask[i]].tolist()
            row = {name: values[i] for name, values in lists.items()}
            if not measured[i]:
                row |= dict.fromkeys(("prob_after", "kl", "kl_head"))
            start = sum(lengths[:i])
            completions.append({
                "prompt": self.tokenizer.decode(micro_batch.input_ids[i, :-width][attended[i, :-width]].tolist()),
                "text": self.tokenizer.decode(ids),
                "reward": None if micro_batch.rewards is None else _number(float(micro_batch.rewards[i])),
                "advantage": _number(float(micro_batch.tokens.advantages[start])) if length else None,
                "tokens": [self.tokenizer.decode([token]) for token in ids],
                **row,
                "reason": [int(reason) for reason in row["reason"]],
            })  # fmt: skip
        return completions


def _columns(micro_batch: MicroBatch, found: Measured | None) -> dict[str, Tensor]:
    """A record's columns, (N,) each, in their order; NaN where nothing was measured."""
    tokens, selection = micro_batch.tokens, micro_batch.in_step
    unmeasured = torch.full((len(tokens),), math.nan, dtype=torch.float64, device=tokens.features.device)

    def spread(values: Tensor | None) -> Tensor:
        return unmeasured if found is None else unmeasured.masked_scatter(found.chosen, values.double())

    return {
        "prob": tokens.action_log_prob(micro_batch.log_mass).exp(),
        "prob_after": spread(found and found.log_prob.exp()),
        "entropy": micro_batch.entropy,
        "policy_shift": selection.policy_shift,
        "objective_shift": selection.objective_shift,
        "gradient_norm": tokens.gradient_norm(),
        "kl": spread(found and found.kl),
        "kl_head": spread(found and found.kl_head),
        "weight": selection.weight,
        "reason": reasons(selection),
    }


def reasons(selection: TokenSelection) -> Tensor:
    """(N,) int64, why a token's weight was lowered: the sum of 1 (policy shift), 2 (objective), 4 (not finite), 8."""
    return sum(getattr(selection, name).long() * bit for name, bit in REASONS.items())


def _numbers(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float | None) -> float | None:
    """Four significant digits; None for what JSON has no number for."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
