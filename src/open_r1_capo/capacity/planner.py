"""What fits, what it costs, and what would fit instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from open_r1_capo.capacity import memory, timing
from open_r1_capo.capacity.devices import Device
from open_r1_capo.capacity.memory import Part
from open_r1_capo.capacity.workload import Workload


@dataclass(frozen=True)
class Plan:
    """A workload on a device.

    Attributes:
        workload: what runs.
        device: on each GPU.
        parts: of the memory.
        rows: of the step's time, in seconds.
        largest: the largest micro-batch that fits, None if none does.
        remedies: what would fit instead, a phrase each; empty if the plan fits.
    """

    workload: Workload
    device: Device
    parts: list[Part]
    rows: dict[str, float]
    largest: int | None
    remedies: list[str]

    @property
    def peak(self) -> tuple[str, float]:
        """The phase with most memory, and its bytes."""
        found = memory.peaks(self.parts)
        phase = max(found, key=found.get)
        return phase, found[phase]

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return fits(self.workload, self.device)

    @property
    def engine_fits(self) -> bool:
        """Whether a vLLM engine, if there is one, holds its weights and a sequence."""
        return engine_fits(self.workload, self.device)

    @property
    def step(self) -> float:
        """Seconds of an optimizer step."""
        return sum(self.rows.values())

    def gpu_hours(self, seeds: int) -> float:
        """Of training, so many seeds."""
        return seeds * self.workload.steps * self.step * self.workload.gpus / 3600

    @property
    def checkpoints(self) -> int:
        """How many a run writes; each is evaluated."""
        return self.workload.steps // self.workload.save_every

    @property
    def evaluation(self) -> float:
        """Seconds of evaluating one checkpoint; 0 on a CPU, where the lab is evaluated by the run itself."""
        return 0.0 if self.device.is_cpu else timing.evaluation_seconds(self.workload, self.device)


def make(workload: Workload, device: Device) -> Plan:
    """Plan a workload.

    Args:
        workload: what shall run.
        device: where.

    Returns:
        The plan.
    """
    remedies = [] if fits(workload, device) else list(alternatives(workload, device))
    found, largest = memory.parts(workload, device), largest_micro_batch(workload, device)
    return Plan(workload, device, found, timing.rows(workload, device), largest, remedies)


def fits(workload: Workload, device: Device) -> bool:
    """Whether the memory holds every phase, and an engine at least one sequence.

    Args:
        workload: what shall run.
        device: where.

    Returns:
        True if a run should not end for want of memory.
    """
    return engine_fits(workload, device) and max(
        memory.peaks(memory.parts(workload, device)).values()
    ) <= memory.usable(device)


def engine_fits(workload: Workload, device: Device) -> bool:
    """Whether a vLLM engine, if there is one, holds its weights and the longest sequence."""
    longest = workload.prompt_limit + workload.completion_limit
    return workload.generation == "transformers" or memory.engine_capacity(workload, device) >= longest


def divisors(number: int) -> list[int]:
    """The divisors of a number, largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def largest_micro_batch(workload: Workload, device: Device) -> int | None:
    """The largest micro-batch that fits, among those that divide a rank's completions."""
    return next((n for n in divisors(workload.sequences) if fits(workload.split(n), device)), None)


def alternatives(workload: Workload, device: Device) -> Iterator[str]:
    """Changes that would make a workload fit, the smallest first; each is planned before it is named.

    Args:
        workload: one that does not fit.
        device: where.

    Yields:
        Words for `make plan` and `make train`, such as `ARGS="per_device_train_batch_size=12"`.
    """
    found: list[set[str]] = []
    for names, words, other in sorted(_candidates(workload), key=lambda candidate: len(candidate[0])):
        if any(smaller and smaller <= names for smaller in found):
            continue
        settings = _settings(other, device, workload)
        if settings is not None:
            found.append(names)
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
                names = {"gpus"} if factor > 1 else set()
                names |= {"zero3"} if accelerator != workload.accelerator else set()
                names |= {"server"} if server else set()
                servers = _servers(workload, total, nodes) if server else workload.servers * factor
                ranks = total - servers
                useless = (server and workload.servers) or (accelerator == "zero3" and ranks == 1)
                if useless or ranks < 1 or workload.completions % ranks:
                    continue
                generation = "vllm_server" if server else workload.generation
                other = workload.on(
                    ranks, servers=servers, nodes=nodes, accelerator=accelerator, generation=generation
                )
                change = ["ACCELERATOR=zero3"] if "zero3" in names else []
                change += [f"GENERATION=vllm_server SERVER_GPUS={servers}"] if server else []
                yield names, [*words, *change], other


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
        largest = largest_micro_batch(other, device)
        if largest:
            given = asked.micro_batch if other.sequences % asked.micro_batch == 0 else 0
            batch = given if given and fits(other.split(given), device) else largest
            settings = [] if batch == asked.micro_batch else [f"per_device_train_batch_size={batch}"]
            settings += [] if share == asked.engine_share else [f"vllm_gpu_memory_utilization={share}"]
            return " ".join(settings)
    return None
