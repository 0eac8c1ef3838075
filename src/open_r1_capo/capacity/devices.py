"""Machines: what the makers state, what is assumed to be reached of it, and how a CPU measures itself."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from open_r1_capo.capacity.shapes import PlanError

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as given to `GPU=`.
        flops: dense bfloat16 operations a second (float32 for the CPU), as stated.
        memory: bytes that a program can see.
        bandwidth: of that memory, bytes a second.
        link: to the other accelerators of the node, bytes a second in one direction.
        network: each accelerator's share of the network between nodes, likewise.
        source: of these numbers.
        matmul_share: share of `flops` that training reaches.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str
    matmul_share: float = 0.4

    @property
    def is_cpu(self) -> bool:
        """Whether the host itself computes, so that its time to issue an operator is not hidden."""
        return self.name == "cpu"


# --- assumptions, none of them fitted to the paper's times -----------------------------------------------------------
# matmul_share 0.4: 38 to 43 % of H100's bfloat16 peak in Llama 3's training (arXiv 2407.21783, Table 4)
STREAM_SHARE = 0.8  # of the memory's stated bandwidth; large copies reach 0.85 to 0.9, attention over a cache less
LINK_SHARE = 0.7  # of a link's stated rate, in collectives of large buffers
# transformers' generate on a 2.6 GHz EPYC core, where two sequences of width 128 leave little else to do
OPERATOR_SECONDS = 18e-6  # the host's time to issue an operator
ENGINE_STEP_SECONDS = 2e-3  # vLLM's scheduler and sampler between two decoding steps, with CUDA graphs
DISK_RATE = 2e9  # bytes a second that a node's ranks write together, to one NVMe disk or a shared file system
RESERVE = 0.04  # of the memory: allocator's fragments
CONTEXT_BYTES = 2 * GIB  # CUDA's and NCCL's own, and vLLM's graphs

# memory: what nvidia-smi shows; networks: the usual one 400 Gbit/s adapter a GPU (200 for A100, 100 for L40S)
DEVICES = {
    "h100": Device("h100", 989.4e12, 81559 * MIB, 3.35e12, 450e9, 50e9, "NVIDIA H100 SXM5 80 GB data sheet"),
    "h200": Device("h200", 989.4e12, 143771 * MIB, 4.8e12, 450e9, 50e9, "NVIDIA H200 SXM data sheet"),
    "a100-80": Device("a100-80", 312e12, 81920 * MIB, 2.039e12, 300e9, 25e9, "NVIDIA A100 SXM4 80 GB data sheet"),
    "a100-40": Device("a100-40", 312e12, 40960 * MIB, 1.555e12, 300e9, 25e9, "NVIDIA A100 SXM4 40 GB data sheet"),
    "l40s": Device("l40s", 362.05e12, 46068 * MIB, 864e9, 32e9, 12.5e9, "NVIDIA L40S data sheet; PCIe 4 x16"),
}


def find_device(name: str) -> Device:
    """A device by name; `cpu` is measured.

    Args:
        name: of `DEVICES`, or `cpu`.

    Returns:
        The device.

    Raises:
        PlanError: an unknown name.
    """
    if name == "cpu":
        return measured_cpu()
    if name not in DEVICES:
        raise PlanError(f"there is no GPU {name!r} in the table; there are {', '.join([*DEVICES, 'cpu'])}")
    return DEVICES[name]


def measured_cpu(size: int = 256, seconds: float = 0.2) -> Device:
    """This machine on one thread: a matrix product's rate in float32, and a copy's.

    Processor seconds are counted, so that other programs do not matter.

    Args:
        size: of the square matrices, about what a lab step multiplies.
        seconds: for each measurement.

    Returns:
        The device; its `matmul_share` is 1, because the rate was reached.
    """
    import torch

    a, b = torch.ones(size, size), torch.ones(size, size)
    source, target = torch.ones(2**24), torch.ones(2**24)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = _best_seconds(lambda: torch.mm(a, b), seconds)
        copy = _best_seconds(lambda: target.copy_(source), seconds)
    finally:
        torch.set_num_threads(threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    copied = 8 * source.numel() / copy
    return Device("cpu", 2 * size**3 / product, memory, copied, copied, copied, "measured now, one thread", 1.0)


def _best_seconds(function, seconds: float) -> float:
    """The least processor seconds of a call, after one to warm up."""
    function()
    best, end = float("inf"), time.process_time() + seconds
    while time.process_time() < end:
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best
