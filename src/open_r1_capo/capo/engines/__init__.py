"""Which code runs the inner loops of `AdamStep`: Triton on a GPU, C on a CPU, torch anywhere."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from open_r1_capo.capo import adam
from open_r1_capo.capo.engines import native
from open_r1_capo.capo.moments import MomentTable
from open_r1_capo.capo.segments import ENGINE_VARIABLE, uses_triton


def choose(table: MomentTable, features: Tensor, scratch_bytes: int) -> ModuleType:
    """The engine, a module with `propose`, `commit` and `planned` as `adam`, for moments and features of one device.

    The C engine must widen narrow features as a whole, which `scratch_bytes` may not allow.

    Raises:
        ValueError: the environment names an engine that there is not.
    """
    wanted = os.environ.get(ENGINE_VARIABLE, "")
    if wanted not in ("", "torch", "native", "triton"):
        raise ValueError(f"{ENGINE_VARIABLE}: expected torch, native or triton, got {wanted!r}")
    if uses_triton(features):
        from open_r1_capo.capo.engines import kernels

        return kernels
    arithmetic = torch.promote_types(features.dtype, torch.float32)
    if wanted == "torch" or features.is_cuda or not native.available() or table.first.dtype != arithmetic:
        return adam
    widened = features.numel() * arithmetic.itemsize if features.dtype != arithmetic else 0
    return native if widened <= scratch_bytes else adam
