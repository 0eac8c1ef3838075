"""Adam's arithmetic on rows of moments in C (`native.c`): five times faster than `adam.py` on a CPU, no scratch.

setup.py builds the library beside this file where it finds a compiler. It is plain C without Python's headers, called
through ctypes, which frees the interpreter: ranges of the work run on torch's number of threads.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from open_r1_capo.capo.adam import AdamRule, fold, resting
from open_r1_capo.capo.last_layer import NO_ID, TokenBatch, row_entries
from open_r1_capo.capo.moments import MomentTable
from open_r1_capo.capo.segments import CACHE_BYTES, chunks

INTERFACE = 3  # of native.c; a library that was built before its arguments changed is passed over


def _load() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            library.native_interface.restype = ctypes.c_int64
            return library if library.native_interface() == INTERFACE else None
    return None


_LIBRARY = _load()


def available() -> bool:
    """Whether the library was built."""
    return _LIBRARY is not None


def propose(rule: AdamRule, table: MomentTable, batch: TokenBatch, step: int, scratch: int) -> Tensor:
    """As `adam.propose`."""
    row = table.row_of[batch.token_ids]
    pull, push, eps, scale = fold(rule, table, row, batch.coefficient, step)
    z = torch.empty_like(pull)
    features = batch.features.to(z.dtype).contiguous()
    order = torch.argsort(_by_block_and_row(table, row, features), stable=True)
    tensors = (order, row, table.first, table.second, features, pull, push, eps.contiguous(), z)
    _run("propose", z.dtype, _even(len(order)), (row.shape[1], features.shape[1]), lambda: tensors)
    return z.mul_(scale)


def commit(rule: AdamRule, table: MomentTable, batch: TokenBatch, weight: Tensor, step: int, scratch: int) -> None:
    """As `adam.commit`."""
    entries = row_entries(batch, weight)
    row = table.grow(entries.token_ids)
    dtype, dim = table.first.dtype, table.first.shape[1]
    decay1, decay2 = rule.decays(table, row, step - 1)
    keep1, keep2 = ((decay * beta).expand(len(row)) for decay, beta in ((decay1, rule.beta1), (decay2, rule.beta2)))
    add = decay1.new_tensor([1 - rule.beta1, 1 - rule.beta2])
    divisor = (entries.count if rule.moment_average == "per_logit" else entries.tokens).to(dtype).expand(len(row))
    factors = tuple(factor.contiguous() for factor in (divisor, keep1, keep2, add))
    bounds = _by_work(entries.offsets)
    for part in chunks(dim, len(batch) * dtype.itemsize, 2 * CACHE_BYTES):  # blocks of columns that stay in a cache
        features, columns = batch.features[:, part].to(dtype).contiguous(), part.stop - part.start
        inputs = (row, entries.offsets, entries.token, entries.coefficient.contiguous(), features, *factors)
        _run(
            "commit",
            dtype,
            bounds,
            (dim, part.start, columns),
            lambda inputs=inputs, columns=columns: (*inputs, add.new_empty(columns), table.first, table.second),
        )
    table.last_step[row] = step


def planned(rule: AdamRule, table: MomentTable, batch: TokenBatch, step: int, scratch: int) -> Tensor:
    """As `adam.planned`."""
    dtype, dim = table.first.dtype, table.first.shape[1]
    features = batch.features.to(dtype).contiguous()
    ordered, order = torch.sort(_by_block_and_row(table, table.row_of[batch.token_ids], features), stable=True)
    used, length = torch.unique_consecutive(ordered, return_counts=True)
    used, offsets = (used % table.rows).long(), torch.cat([length.new_zeros(1), length.cumsum(0)])
    decay1, decay2 = (decay.expand(len(used)) for decay in rule.decays(table, used, step))
    scale1 = (decay1 / (1 - rule.beta1**step)).masked_fill_(resting(rule, table, used, step), 0)
    scale2 = decay2 / (1 - rule.beta2**step)
    eps = scale1.new_tensor([rule.eps])
    z = table.first.new_empty(batch.token_ids.shape)
    inputs = (used, offsets, order, features, scale1, scale2, eps)
    outputs = (table.first, table.second, z)
    shape = (z.shape[1], dim)
    _run("planned", dtype, _by_work(offsets), shape, lambda: (*inputs, eps.new_empty(dim), *outputs))
    return z


def _by_block_and_row(table: MomentTable, row: Tensor, features: Tensor) -> Tensor:
    """(N·K,) keys that sort entries by row, to read its moments once, within tokens whose features fit a cache."""
    block = torch.arange(len(row)) // max(1, CACHE_BYTES // (features.shape[1] * features.element_size()))
    key = block[:, None] * table.rows + row
    return (key.int() if len(row) and int(block[-1] + 1) * table.rows < NO_ID else key).flatten()


def _run(
    name: str,
    dtype: torch.dtype,
    bounds: list[int],
    shape: tuple[int, ...],
    tensors: Callable[[], tuple[Tensor, ...]],
) -> None:
    """Call a function of the library on every range between two bounds; `tensors` is called once for each range."""
    function = getattr(_LIBRARY, f"{name}_{str(dtype).removeprefix('torch.')}")

    def work(start: int, stop: int) -> None:
        arguments = tensors()  # held until the call is over
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments)
        function(*(ctypes.c_int64(number) for number in (start, stop, *shape)), *pointers)

    ranges = list(itertools.pairwise(bounds))
    if len(ranges) == 1:
        work(*ranges[0])
        return
    with ThreadPoolExecutor(len(ranges)) as pool:
        list(pool.map(lambda bounds: work(*bounds), ranges))


def _even(length: int) -> list[int]:
    """Bounds of one range of equal length for each thread."""
    threads = torch.get_num_threads()
    return [length * i // threads for i in range(threads + 1)]


def _by_work(offsets: Tensor) -> list[int]:
    """Bounds of one range of rows for each thread, with about equally many entries in each."""
    targets = offsets.new_tensor(_even(int(offsets[-1]))[1:-1])
    return [0, *torch.searchsorted(offsets, targets).tolist(), len(offsets) - 1]
