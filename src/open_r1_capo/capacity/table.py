"""An estimate as text of at most 100 columns, or as plain data."""

from __future__ import annotations

from typing import Any

from open_r1_capo.capacity.devices import GIB, MIB
from open_r1_capo.capacity.fit import Estimate, engine_fits
from open_r1_capo.capacity.memory import PHASES, checkpoint_bytes, peaks


def as_data(estimate: Estimate) -> dict[str, Any]:
    """Everything that the table shows, in bytes, ready for JSON."""
    work, (phase, peak) = estimate.workload, estimate.peak
    return {
        "workload": vars(work) | {"shape": vars(work.shape) | {"parameters": work.shape.parameters}},
        "device": vars(estimate.device),
        "memory": {
            item.name: {"bytes": item.size, "phases": item.phases, "note": item.note} for item in estimate.items
        },
        "phases": peaks(estimate.items),
        "peak": {"phase": phase, "bytes": peak, "usable": estimate.device.usable},
        "fits": estimate.fits,
        "largest_micro_batch": estimate.largest,
        "remedies": estimate.remedies,
        "checkpoint_bytes": checkpoint_bytes(work),
        "checkpoints": work.checkpoints,
    }


def as_text(estimate: Estimate, seeds: int) -> str:
    """The table; its last line has the disk of so many seeds."""
    work, each = estimate.workload, checkpoint_bytes(estimate.workload)
    run = work.checkpoints * each
    disk = f"checkpoints: {work.checkpoints} × {_size(each)} = {_size(run)} on disk a seed"
    disk += f"; {seeds} seeds: {_size(seeds * run)}"
    return "\n".join([*_title(estimate), "", *_memory(estimate), "", disk])


def _title(estimate: Estimate) -> list[str]:
    work = estimate.workload
    where = f"{work.gpus} × {estimate.device.name}" + (f" on {work.nodes} nodes" if work.nodes > 1 else "")
    how = [work.accelerator if work.ranks > 1 else "one process", work.generation]
    how += [f"{work.servers} of them for servers"] if work.servers else []
    ranks, count = "ranks" if work.ranks > 1 else "rank", work.shape.parameters
    parameters = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
    return [
        f"{work.title}: {work.shape.name}, {parameters} parameters",
        f"{where}, {', '.join(how)}",
        f"a step: {work.completions} completions = {work.ranks} {ranks} × {work.accumulation} × {work.micro_batch}",
    ]


def _memory(estimate: Estimate) -> list[str]:
    unit, name = (GIB, "GiB") if estimate.peak[1] >= GIB else (MIB, "MiB")
    what = "memory of the process" if estimate.device.is_cpu else "memory of a training GPU"
    lines = [f"{what:<40}{name:>7}"]
    for item in estimate.items:
        when = "" if item.phases == PHASES else ", ".join(item.phases)
        note = "; ".join(text for text in (when, item.note) if text)
        lines.append(f"  {item.name:<38}{item.size / unit:>7.1f}  {note}".rstrip()[:100])
    in_use = [f"{phase} {size / unit:.1f}" for phase, size in peaks(estimate.items).items()]
    lines.append(f"  in use: {', '.join(in_use)} of {estimate.device.usable / unit:.1f} {name}")
    return lines + _verdict(estimate)


def _verdict(estimate: Estimate) -> list[str]:
    if estimate.fits:
        return [f"  it fits; the largest micro-batch that does is {estimate.largest}"]
    why = "an engine has no room for one sequence beside its weights"
    if engine_fits(estimate.workload, estimate.device):
        phase, size = estimate.peak
        why = f"{(size - estimate.device.usable) / GIB:.1f} GiB too much in {phase}"
    if not estimate.remedies:
        return [
            f"  it does not fit: {why};",
            "  none of the remedies tried would help: take larger GPUs or a smaller model",
        ]
    return [f"  it does not fit: {why}. What would fit:", *(f"    {remedy}" for remedy in estimate.remedies)]


def _size(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / MIB:.1f} MiB"
