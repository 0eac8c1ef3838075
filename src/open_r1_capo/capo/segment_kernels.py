"""Sums of features over the entries of each vocabulary row in Triton: what `segments.segment_sums` runs on a GPU."""

# ruff: noqa: PLR0913, PLR0917 - a kernel has a pointer for every tensor
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"ENTRIES": 16, "WIDTH": 128, "num_warps": 4}  # entries of one row × columns of D


def segment_sums(offsets: Tensor, token: Tensor, coefficient: Tensor, features: Tensor) -> Tensor:
    """As `segments.segment_sums`, for features of any floating dtype."""
    rows, dim = len(offsets) - 1, features.shape[1]
    out = coefficient.new_empty(rows, dim)
    if rows:
        _sums[(rows, triton.cdiv(dim, TILE["WIDTH"]))](
            offsets,
            token,
            coefficient,
            features.contiguous(),
            out,
            dim,
            REAL=real(out.dtype),
            **TILE,
        )
    return out


def real(dtype: torch.dtype) -> tl.dtype:
    """The kernels' type of a tensor's arithmetic."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def row_sum(
    offsets_ptr,
    token_ptr,
    coefficient_ptr,
    features_ptr,
    segment,
    column,
    dim,
    REAL: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A block of columns of Σ coefficient · x over one segment's entries, always in the same order."""
    stop = tl.load(offsets_ptr + segment + 1)
    total = tl.zeros([WIDTH], REAL)
    for start in range(tl.load(offsets_ptr + segment), stop, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        inside = place < stop
        token = tl.load(token_ptr + place, mask=inside, other=0)[:, None]
        coefficient = tl.load(coefficient_ptr + place, mask=inside, other=0).to(REAL)[:, None]
        x = tl.load(
            features_ptr + token * dim + column[None, :], mask=inside[:, None] & (column < dim)[None, :], other=0
        ).to(REAL)
        total += tl.sum(coefficient * x, axis=0)
    return total


@triton.jit
def _sums(
    offsets_ptr,
    token_ptr,
    coefficient_ptr,
    features_ptr,
    out_ptr,
    dim,
    REAL: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One segment, one block of columns."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = row_sum(offsets_ptr, token_ptr, coefficient_ptr, features_ptr, segment, column, dim, REAL, ENTRIES, WIDTH)
    tl.store(out_ptr + segment * dim + column, total, mask=column < dim)
