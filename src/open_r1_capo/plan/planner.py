"""What fits, what it costs, and what would fit instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from open_r1_capo.plan import memory, timing
from open_r1_capo.plan.devices import Device
from open_r1_capo.plan.memory import Part
from open_r1_capo.plan.workload import Workload


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
    if workload.generation != "transformers":
        needed = workload.prompt_limit + workload.completion_limit
        if memory.engine_capacity(workload, device) < needed:
            return False
    return max(memory.peaks(memory.parts(workload, device)).values()) <= memory.usable(device)


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
        Phrases such as `per_device_train_batch_size=12`.
    """
    largest = largest_micro_batch(workload, device)
    if largest:
        yield f'ARGS="per_device_train_batch_size={largest}"'
    share = _engine_share(workload, device)
    if share:
        yield f'ARGS="vllm_gpu_memory_utilization={share}"'
    sharded = replace(workload, accelerator="zero3")
    changed = [("ACCELERATOR=zero3", sharded)] if workload.ranks > 1 else []
    for other in (workload, sharded):
        server = _server(other)
        if server:
            phrase = f"GENERATION=vllm_server SERVER_GPUS={server.servers}"
            changed.append((phrase if other is workload else f"ACCELERATOR=zero3 {phrase}", server))
    for phrase, other in changed:
        if "zero3" in phrase and workload.accelerator == "zero3":
            continue
        found = largest_micro_batch(other, device)
        if found:
            yield phrase + _with_batch(found)
    more = _more_gpus(workload, device)
    if more:
        yield more


def _engine_share(workload: Workload, device: Device) -> float | None:
    """Another share of the memory for a colocated engine, in twentieths; None if none helps."""
    if workload.generation != "vllm_colocate":
        return None
    shares = (n / 20 for n in range(1, 20))
    return next((s for s in shares if fits(replace(workload, engine_share=s), device)), None)


def _server(workload: Workload) -> Workload | None:
    """The same with servers on a part of the GPUs, so that the others share the completions; None if that is so."""
    if workload.generation == "vllm_server":
        return None
    counts = [n for n in range(workload.ranks - 1, 0, -1) if workload.completions % n == 0]
    if not counts:
        return None
    return workload.on(counts[0], generation="vllm_server", servers=workload.ranks - counts[0])


def _with_batch(micro_batch: int) -> str:
    return f' with ARGS="per_device_train_batch_size={micro_batch}"'


def _more_gpus(workload: Workload, device: Device) -> str | None:
    """The least number of training GPUs that fits, among doubles of what there is."""
    per_node = max(1, workload.gpus // workload.nodes)
    for factor in (2, 4, 8, 16, 32):
        ranks = workload.ranks * factor
        if workload.completions % ranks:
            continue
        nodes = max(workload.nodes, -(-(ranks + workload.servers) // max(8, per_node)))
        other = workload.on(ranks, nodes=nodes)
        found = largest_micro_batch(other, device)
        if found:
            gpus = (ranks + workload.servers) // nodes
            return f"GPUS={gpus}{f' NODES={nodes}' if nodes > 1 else ''}" + _with_batch(found)
    return None
