"""Collectives: what the ranks of one update know together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from open_r1_capo.capo import TokenSelection
from open_r1_capo.capo.last_layer import RowGradient, merge
from open_r1_capo.training.update import MicroBatch


def gather_columns(accelerator: Accelerator, columns: Tensor) -> Tensor:
    """(C, N) of every rank side by side, (C, ΣN); the first column is never negative, which tells the padding."""
    padded = accelerator.pad_across_processes(columns, dim=1, pad_index=-1.0)
    everyone = accelerator.gather(padded.T.contiguous()).T
    return everyone[:, everyone[0] >= 0]


def gather_selection(accelerator: Accelerator, micro_batches: Sequence[MicroBatch]) -> tuple[TokenSelection, Tensor]:
    """The update's selection over all micro-batches and ranks, and which of its N tokens have a gradient ((N,) bool).

    The tokens are in no particular order.
    """
    selection = TokenSelection.cat([one.in_step for one in micro_batches])
    moving = torch.cat([one.tokens.advantages != 0 for one in micro_batches])
    columns = torch.stack([column.float() for column in (*vars(selection).values(), moving)])
    weight, policy, objective, *flags, moving = gather_columns(accelerator, columns)
    return TokenSelection(weight, policy, objective, *(flag.bool() for flag in flags)), moving.bool()


def sum_ranks(accelerator: Accelerator, totals: Tensor) -> Tensor:
    """The sum of a small CPU tensor over the ranks, on the CPU."""
    return accelerator.reduce(totals.to(accelerator.device), "sum").cpu()


def sum_rows(accelerator: Accelerator, mine: RowGradient) -> RowGradient:
    """Sum the gradient rows over the ranks: the union of the ids first, then one all-reduce of its rows."""
    if accelerator.num_processes == 1:
        return mine
    ids = accelerator.pad_across_processes(mine.token_ids, dim=0, pad_index=-1)
    union = torch.unique(accelerator.gather(ids))
    union = union[union >= 0]
    empty = RowGradient(
        union,
        mine.total.new_zeros(len(union), mine.total.shape[1]),
        mine.count.new_zeros(len(union)),
        torch.zeros_like(mine.tokens),
    )
    aligned = merge([empty, mine])
    reduced = [accelerator.reduce(x, "sum") for x in (aligned.total, aligned.count, aligned.tokens)]
    return RowGradient(union, *reduced)
