"""GPUs by name, and what of their memory is not the trainer's."""

from __future__ import annotations

import os
from dataclasses import dataclass

from open_r1_capo.capacity import CapacityError

MIB, GIB = 2**20, 2**30
RESERVE = 0.04  # of the memory: fragments of the allocator (assumed)
CONTEXT_BYTES = 2 * GIB  # CUDA's and NCCL's own, and vLLM's graphs (assumed)


@dataclass(frozen=True)
class Device:
    """A GPU, or the host."""

    name: str  # as given to `GPU=`
    memory: float  # bytes that a program can see

    @property
    def is_cpu(self) -> bool:
        """Whether this is the host, which has no CUDA context."""
        return self.name == "cpu"

    @property
    def usable(self) -> float:
        """Bytes that a run may fill."""
        return self.memory * (1 - RESERVE)


# MiB that nvidia-smi shows
MEMORY = {"h100": 81559, "h200": 143771, "a100-80": 81920, "a100-40": 40960, "l40s": 46068}


def find_device(name: str) -> Device:
    """Look up a GPU by name; `cpu` is this machine. Raises CapacityError for an unknown name."""
    if name == "cpu":
        return Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if name not in MEMORY:
        raise CapacityError(f"there is no GPU {name!r} in the table; there are {', '.join([*MEMORY, 'cpu'])}")
    return Device(name, MEMORY[name] * MIB)
