"""Sums and dot products between token features and vocabulary rows, in bounded memory and without loops over ids.

On a CPU the chunks are as large as its caches rather than as large as the bound: every intermediate is then written
and read where it is cheap, which is worth more than the fewer calls of larger chunks.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ENGINE_VARIABLE = "OPEN_R1_CAPO_ENGINE"  # torch, native or triton: use this one, whatever the device
CACHE_BYTES = 4 * 2**20  # temporaries of one chunk on a CPU: about a core's share of its last two cache levels


def chunks(length: int, bytes_each: int, scratch_bytes: int) -> Iterator[slice]:
    """Consecutive slices of 0..length whose items, of `bytes_each`, fit into `scratch_bytes` (at least one each)."""
    size = max(1, scratch_bytes // max(1, bytes_each))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def working_set(device: torch.device, scratch_bytes: int) -> int:
    """Bytes that a chunk's temporaries should take on `device`, at most `scratch_bytes`."""
    return min(scratch_bytes, CACHE_BYTES) if device.type == "cpu" else scratch_bytes


def uses_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels run on this tensor; triton is no dependency of machines without a GPU."""
    wanted = os.environ.get(ENGINE_VARIABLE, "")
    return wanted == "triton" or (not wanted and tensor.is_cuda and importlib.util.find_spec("triton") is not None)


def segment_sums(offsets: Tensor, token: Tensor, coefficient: Tensor, features: Tensor, scratch_bytes: int) -> Tensor:
    """(R, D), Σ coefficient_e · x_{token_e} over the entries e of each segment, in their order.

    Args:
        offsets: (R + 1,) int64, bounds of the segments.
        token: (E,) int64.
        coefficient: (E,), its dtype is that of the arithmetic.
        features: x_ND.
        scratch_bytes: bound of the temporary memory beside the result, which narrow features need.
    """

    def sums(x: Tensor) -> Tensor:
        return F.embedding_bag(
            token, x.contiguous(), offsets, mode="sum", per_sample_weights=coefficient, include_last_offset=True
        )

    if uses_triton(features):
        from open_r1_capo.capo import segment_kernels

        return segment_kernels.segment_sums(offsets, token, coefficient, features)
    if len(token) == 0:
        return coefficient.new_zeros(len(offsets) - 1, features.shape[1])
    if features.dtype == coefficient.dtype:
        return sums(features)
    out = coefficient.new_empty(len(offsets) - 1, features.shape[1])
    bytes_each = (len(features) + len(out)) * out.element_size()
    for columns in chunks(features.shape[1], bytes_each, scratch_bytes):
        out[:, columns] = sums(features[:, columns].to(out.dtype))
    return out


def support_dots(table: Tensor, row: Tensor, features: Tensor, scratch_bytes: int) -> Tensor:
    """(N, K), z_ij = table[row_ij] · x_i in bounded chunks, for `table` (R, D), `row` (N, K) int64, `features` x_ND.

    The arithmetic is in the table's dtype.
    """
    (n, k), d = row.shape, table.shape[1]
    z = table.new_empty(n, k)
    for part in chunks(n, k * d * table.element_size(), working_set(table.device, scratch_bytes)):
        rows = table.index_select(0, row[part].flatten()).view(-1, k, d)
        x = features[part, None, :].to(table.dtype)
        z[part] = torch.bmm(x, rows.transpose(1, 2))[:, 0]  # x on the left: ten times faster on a CPU
    return z


def entry_dots(table: Tensor, row: Tensor, features: Tensor, token: Tensor, scratch_bytes: int) -> Tensor:
    """(E,), table[row_e] · x_{token_e} in bounded chunks, for `table` (R, D), `row` and `token` (E,) int64."""
    out = table.new_empty(len(row))
    width = table.shape[1] * table.element_size()
    for part in chunks(len(row), 2 * width, working_set(table.device, scratch_bytes)):
        x = features.index_select(0, token[part]).to(table.dtype)
        out[part] = x.mul_(table.index_select(0, row[part])).sum(1)
    return out
