"""What fits into a GPU's memory, and what would fit instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from open_r1_capo.capacity.devices import Device
from open_r1_capo.capacity.memory import MemoryItem, engine_tokens, memory_items, peaks
from open_r1_capo.capacity.workload import Workload


@dataclass(frozen=True)
class Estimate:
    """The memory of a workload on a device."""

    workload: Workload
    device: Device
    items: list[MemoryItem]  # the memory of a training GPU
    fits: bool  # every phase does, and a vLLM engine holds its weights and a sequence
    largest: int | None  # the largest micro-batch that fits; None if none does
    remedies: list[str]  # what would fit instead, a phrase each; empty if the workload fits

    @property
    def peak(self) -> tuple[str, float]:
        """The phase with most memory, and its bytes."""
        return max(peaks(self.items).items(), key=lambda phase: phase[1])


def estimate(workload: Workload, device: Device) -> Estimate:
    """Compute a workload's memory, and look for what would fit if it does not."""
    fitting = fits(workload, device)
    remedies = [] if fitting else list(alternatives(workload, device))
    items, largest = memory_items(workload, device), largest_that_fits(workload, device)
    return Estimate(workload, device, items, fitting, largest, remedies)


def fits(workload: Workload, device: Device) -> bool:
    """Whether the memory holds every phase, and a vLLM engine at least one sequence."""
    return engine_fits(workload, device) and max(peaks(memory_items(workload, device)).values()) <= device.usable


def engine_fits(workload: Workload, device: Device) -> bool:
    """Whether a vLLM engine, if there is one, holds its weights and the longest sequence."""
    longest = workload.prompt_limit + workload.completion_limit
    return workload.generation == "transformers" or engine_tokens(workload, device) >= longest


def largest_that_fits(workload: Workload, device: Device) -> int | None:
    """The largest micro-batch that fits, among those that divide a rank's completions."""
    sizes = (size for size in range(workload.sequences, 0, -1) if workload.sequences % size == 0)
    return next((size for size in sizes if fits(workload.with_micro_batch(size), device)), None)


def alternatives(workload: Workload, device: Device) -> Iterator[str]:
    """Changes that would make a workload fit, the smallest first; each has been checked to fit.

    They are words for `make plan` and `make train`, such as `ARGS="per_device_train_batch_size=12"`.
    """
    helpful: list[set[str]] = []
    for changes, words, other in sorted(_candidates(workload), key=lambda candidate: len(candidate[0])):
        if any(fewer and fewer <= changes for fewer in helpful):
            continue
        settings = _settings(other, device, workload)
        if settings is not None:
            helpful.append(changes)
            yield " ".join([*words, *([f'ARGS="{settings}"'] if settings else [])])


def _candidates(workload: Workload) -> Iterator[tuple[set[str], list[str], Workload]]:
    """Other accelerators, generations and numbers of GPUs: what is changed, in words, and the workload."""
    per_node = max(8, workload.gpus // workload.nodes)
    for factor in (1, 2, 4, 8, 16):
        total = workload.gpus * factor
        nodes = max(workload.nodes, math.ceil(total / per_node))
        words = [f"GPUS={total // nodes}", *([f"NODES={nodes}"] if nodes > 1 else [])] if factor > 1 else []
        for accelerator in dict.fromkeys((workload.accelerator, "zero3")):
            for server in (False, True):
                changes = {"gpus"} if factor > 1 else set()
                changes |= {"zero3"} if accelerator != workload.accelerator else set()
                changes |= {"server"} if server else set()
                servers = _servers(workload, total, nodes) if server else workload.servers * factor
                ranks = total - servers
                useless = (server and workload.servers) or (accelerator == "zero3" and ranks == 1)
                if useless or ranks < 1 or workload.completions % ranks:
                    continue
                generation = "vllm_server" if server else workload.generation
                other = workload.on(
                    ranks, servers=servers, nodes=nodes, accelerator=accelerator, generation=generation
                )
                more = ["ACCELERATOR=zero3"] if "zero3" in changes else []
                more += [f"GENERATION=vllm_server SERVER_GPUS={servers}"] if server else []
                yield changes, [*words, *more], other


def _servers(workload: Workload, total: int, nodes: int) -> int:
    """The fewest GPUs, of several nodes whole ones, whose loss lets the others share the completions; all if none."""
    each = total // nodes if nodes > 1 else 1
    return next((n for n in range(each, total, each) if workload.completions % (total - n) == 0), total)


def _settings(workload: Workload, device: Device, asked: Workload) -> str | None:
    """The recipe's settings with which a workload fits, where they are not those asked for; None if it never does."""
    shares = [asked.engine_share]
    if workload.generation == "vllm_colocate":
        shares += [n / 20 for n in range(19, 0, -1)]
    for share in shares:
        other = replace(workload, engine_share=share)
        largest = largest_that_fits(other, device)
        if largest:
            given = asked.micro_batch if other.sequences % asked.micro_batch == 0 else 0
            batch = given if given and fits(other.with_micro_batch(given), device) else largest
            settings = [] if batch == asked.micro_batch else [f"per_device_train_batch_size={batch}"]
            settings += [] if share == asked.engine_share else [f"vllm_gpu_memory_utilization={share}"]
            return " ".join(settings)
    return None
