"""Adam's arithmetic on rows of moments in Triton: the engine of a GPU, deterministic, without tensors of width D.

Entries (token, id) are sorted by vocabulary row. A program takes one row, or a tile of its entries, so that the row's
moments are read once for many tokens: at the paper's shape that leaves 2 bytes of features to read per (token, id, d)
where an order by tokens would read 8 bytes of moments.
"""

# ruff: noqa: PLR0913, PLR0917 - a kernel has a pointer for every tensor
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from open_r1_capo.capo.adam import SMALLEST_DECAY, AdamRule, Folded, fold, resting
from open_r1_capo.capo.last_layer import TokenBatch, row_entries
from open_r1_capo.capo.moments import MomentTable
from open_r1_capo.capo.segment_kernels import TILE, real, row_sum


def propose(rule: AdamRule, table: MomentTable, batch: TokenBatch, step: int, scratch: int) -> Tensor:
    """As `adam.propose`."""
    row = table.row_of[batch.token_ids]
    return _logit_changes(table, row, batch, fold(rule, table, row, batch.coefficient, step))


def planned(rule: AdamRule, table: MomentTable, batch: TokenBatch, step: int, scratch: int) -> Tensor:
    """As `adam.planned`: a proposal without a gradient, of the moments as they are."""
    row = table.row_of[batch.token_ids]
    decay1, decay2 = (decay.clamp(min=SMALLEST_DECAY) for decay in rule.decays(table, row, step))
    root = (1 - rule.beta2**step) ** 0.5 / decay2.sqrt()
    scale = (decay1 * root / (1 - rule.beta1**step)).expand(row.shape)
    none = table.first.new_zeros(()).expand(row.shape)
    scale = scale.masked_fill(resting(rule, table, row, step), 0)
    return _logit_changes(table, row, batch, Folded(none, none, (rule.eps * root).expand(row.shape), scale))


def commit(rule: AdamRule, table: MomentTable, batch: TokenBatch, weight: Tensor, step: int, scratch: int) -> None:
    """As `adam.commit`."""
    entries = row_entries(batch, weight)
    row = table.grow(entries.token_ids)
    if len(row) == 0:
        return
    dtype, dim = table.first.dtype, table.first.shape[1]
    decay1, decay2 = rule.decays(table, row, step - 1)
    keep1, keep2 = ((decay * beta).expand(len(row)) for decay, beta in ((decay1, rule.beta1), (decay2, rule.beta2)))
    divisor = (entries.count if rule.moment_average == "per_logit" else entries.tokens).to(dtype).expand(len(row))
    _commit[(len(row), triton.cdiv(dim, TILE["WIDTH"]))](
        entries.offsets,
        entries.token,
        entries.coefficient,
        batch.features.contiguous(),
        row,
        divisor.contiguous(),
        keep1.contiguous(),
        keep2.contiguous(),
        table.first,
        table.second,
        decay1.new_tensor([1 - rule.beta1, 1 - rule.beta2]),
        dim,
        REAL=real(dtype),
        **TILE,
    )
    table.last_step[row] = step


def _logit_changes(table: MomentTable, row: Tensor, batch: TokenBatch, folded: Folded) -> Tensor:
    """z = scale · Σ_d x (P + pull · x) / (√(Q + push · x²) + eps), (N, K), for table rows (N, K)."""
    (n, k), dim = row.shape, batch.features.shape[1]
    z = torch.zeros(n, k, dtype=batch.dtype, device=row.device)
    ordered, order = torch.sort(row.flatten(), stable=True)
    start, stop = _tiles(ordered)
    if len(start):
        _propose[(len(start),)](
            start,
            stop,
            order,
            row,
            table.first,
            table.second,
            batch.features.contiguous(),
            folded.pull.contiguous(),
            folded.push.contiguous(),
            folded.eps.contiguous(),
            z,
            k,
            dim,
            REAL=real(z.dtype),
            **TILE,
        )
    return z.mul_(folded.scale)


def _tiles(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of tiles of bounded size of the sorted entries (E,) that never cross from one row into another."""
    _, length = torch.unique_consecutive(ordered, return_counts=True)
    stop = length.cumsum(0)
    size = TILE["ENTRIES"]
    count = (length + size - 1) // size
    segment = torch.repeat_interleave(torch.arange(len(length), device=length.device), count)
    within = torch.arange(len(segment), device=length.device) - (count.cumsum(0) - count)[segment]
    start = (stop - length)[segment] + within * size
    return start, torch.minimum(start + size, stop[segment])


@triton.jit
def _propose(
    start_ptr,
    stop_ptr,
    order_ptr,
    row_ptr,
    first_ptr,
    second_ptr,
    features_ptr,
    pull_ptr,
    push_ptr,
    eps_ptr,
    z_ptr,
    k,
    dim,
    REAL: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of entries of one row, all of D: the row's moments stay in registers, a block of columns at a time."""
    start = tl.load(start_ptr + tl.program_id(0))
    place = start + tl.arange(0, ENTRIES)
    inside = place < tl.load(stop_ptr + tl.program_id(0))
    entry = tl.load(order_ptr + place, mask=inside, other=0)
    pull = tl.load(pull_ptr + entry, mask=inside, other=0).to(REAL)[:, None]
    push = tl.load(push_ptr + entry, mask=inside, other=0).to(REAL)[:, None]
    eps = tl.load(eps_ptr + entry, mask=inside, other=1).to(REAL)[:, None]
    token = (entry // k)[:, None]
    row = tl.load(row_ptr + tl.load(order_ptr + start)).to(tl.int64)
    total = tl.zeros([ENTRIES], REAL)
    for left in range(0, dim, WIDTH):
        column = left + tl.arange(0, WIDTH)
        within = column < dim
        first = tl.load(first_ptr + row * dim + column, mask=within, other=0).to(REAL)[None, :]
        second = tl.load(second_ptr + row * dim + column, mask=within, other=1).to(REAL)[None, :]
        x = tl.load(features_ptr + token * dim + column[None, :], mask=inside[:, None] & within[None, :], other=0).to(
            REAL
        )
        total += tl.sum(x * (first + pull * x) / (tl.sqrt(second + push * x * x) + eps), axis=1)
    tl.store(z_ptr + entry, total, mask=inside)


@triton.jit
def _commit(
    offsets_ptr,
    token_ptr,
    coefficient_ptr,
    features_ptr,
    row_ptr,
    divisor_ptr,
    keep1_ptr,
    keep2_ptr,
    first_ptr,
    second_ptr,
    add_ptr,
    dim,
    REAL: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row, one block of columns: the gradient's mean in registers, then the moments in place."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    within = column < dim
    total = row_sum(offsets_ptr, token_ptr, coefficient_ptr, features_ptr, segment, column, dim, REAL, ENTRIES, WIDTH)
    mean = total / tl.load(divisor_ptr + segment).to(REAL)
    place = tl.load(row_ptr + segment) * dim + column
    first = tl.load(first_ptr + place, mask=within, other=0) * tl.load(keep1_ptr + segment)
    second = tl.load(second_ptr + place, mask=within, other=0) * tl.load(keep2_ptr + segment)
    tl.store(first_ptr + place, first + tl.load(add_ptr) * mean, mask=within)
    tl.store(second_ptr + place, second + tl.load(add_ptr + 1) * mean * mean, mask=within)
