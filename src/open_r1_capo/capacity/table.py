"""A plan as text of at most 100 columns, or as plain data."""

from __future__ import annotations

from typing import Any

from open_r1_capo.capacity import memory
from open_r1_capo.capacity.devices import GIB, MIB
from open_r1_capo.capacity.memory import PHASES
from open_r1_capo.capacity.planner import Plan

NOT_PLANNED = "not in the time: rewards, data, start-up"


def as_data(plan: Plan, seeds: int, measured: dict[str, float]) -> dict[str, Any]:
    """Everything that the table shows, in bytes and seconds.

    Args:
        plan: to be shown.
        seeds: of the experiment.
        measured: seconds of a run's step, may be empty.

    Returns:
        JSON-ready values.
    """
    work, (phase, peak) = plan.workload, plan.peak
    return {
        "workload": vars(work) | {"shape": vars(work.shape) | {"parameters": work.shape.parameters}},
        "device": vars(plan.device),
        "memory": {part.name: {"bytes": part.size, "phases": part.phases, "note": part.note} for part in plan.parts},
        "phases": memory.peaks(plan.parts),
        "peak": {"phase": phase, "bytes": peak, "usable": memory.usable(plan.device)},
        "fits": plan.fits,
        "largest_micro_batch": plan.largest,
        "remedies": plan.remedies,
        "step_seconds": plan.rows | {"total": plan.step},
        "measured_seconds": measured,
        "checkpoint_bytes": memory.checkpoint_bytes(work),
        "checkpoints": plan.checkpoints,
        "gpu_hours": plan.gpu_hours(seeds),
        "evaluation_seconds": plan.evaluation,
        "seeds": seeds,
    }


def as_text(plan: Plan, seeds: int, measured: dict[str, float]) -> str:
    """The table.

    Args:
        plan: to be shown.
        seeds: of the experiment.
        measured: seconds of a run's step, may be empty.

    Returns:
        Lines.
    """
    lines = [*_title(plan), "", *_memory(plan), ""]
    if plan.engine_fits:
        lines += [*_time(plan, measured), "", *_cost(plan, seeds)]
    return "\n".join(lines).rstrip()


def _title(plan: Plan) -> list[str]:
    work, device = plan.workload, plan.device
    where = f"{work.gpus} × {device.name}" + (f" on {work.nodes} nodes" if work.nodes > 1 else "")
    how = [work.accelerator if work.ranks > 1 else "one process", work.generation]
    how += [f"{work.servers} of them for servers"] if work.servers else []
    ranks = "ranks" if work.ranks > 1 else "rank"
    return [
        f"{work.title}: {work.shape.name}, {_count(work.shape.parameters)} parameters",
        f"{where}, {', '.join(how)}",
        f"a step: {work.completions} completions = {work.ranks} {ranks} × {work.accumulation} × {work.micro_batch}",
    ]


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _memory(plan: Plan) -> list[str]:
    unit, name = (GIB, "GiB") if plan.peak[1] >= GIB else (MIB, "MiB")
    what = "memory of the process" if plan.device.is_cpu else "memory of a training GPU"
    lines = [f"{what:<40}{name:>7}"]
    for part in plan.parts:
        when = "" if part.phases == PHASES else ", ".join(part.phases)
        note = "; ".join(text for text in (when, part.note) if text)
        lines.append(f"  {part.name:<38}{part.size / unit:>7.1f}  {note}".rstrip()[:100])
    usable = memory.usable(plan.device)
    in_use = [f"{phase} {size / unit:.1f}" for phase, size in memory.peaks(plan.parts).items()]
    lines.append(f"  in use: {', '.join(in_use)} of {usable / unit:.1f} {name}")
    return lines + _verdict(plan)


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return [f"  it fits; the largest micro-batch that does is {plan.largest}"]
    why = "an engine has no room for one sequence beside its weights"
    if plan.engine_fits:
        phase, size = plan.peak
        why = f"{(size - memory.usable(plan.device)) / GIB:.1f} GiB too much in {phase}"
    if not plan.remedies:
        return [
            f"  it does not fit: {why};",
            "  none of the remedies tried would help: take larger GPUs or a smaller model",
        ]
    return [f"  it does not fit: {why}. What would fit:", *(f"    {remedy}" for remedy in plan.remedies)]


def _time(plan: Plan, measured: dict[str, float]) -> list[str]:
    work, total = plan.workload, plan.step
    lengths = f"{work.prompt_tokens} + {work.completion_tokens} tokens"
    lines = [f"{'a step of ' + lengths:<40}{'s':>9}{'%':>8}" + (f"{'measured':>12}" if measured else "")]
    for name, value in [*plan.rows.items(), ("total", total)]:
        seen = f"{measured[name]:>12.3f}" if name in measured else ""
        digits = 2 if total >= 10 else 4
        lines.append(f"  {name:<38}{value:>9.{digits}f}{100 * value / total:>8.2f}{seen}")
    others = [f"{name} {value:.3f} s" for name, value in measured.items() if name not in (*plan.rows, "total")]
    return [*lines, f"  {NOT_PLANNED}", *([f"  measured as well: {', '.join(others)}"] if others else [])]


def _cost(plan: Plan, seeds: int) -> list[str]:
    work, unit = plan.workload, "GPU hours" if not plan.device.is_cpu else "processor hours"
    hours = work.steps * plan.step / 3600
    lines = [
        f"{work.steps} steps: {hours:.2f} h a seed; {seeds} seeds: {plan.gpu_hours(seeds):.1f} {unit}",
        f"checkpoints: {plan.checkpoints} × {_size(memory.checkpoint_bytes(work))}"
        f" = {_size(plan.checkpoints * memory.checkpoint_bytes(work))} on disk a seed",
    ]
    if plan.evaluation:
        each, all_hours = plan.evaluation / 60, plan.checkpoints * plan.evaluation * work.gpus * seeds / 3600
        lines.append(
            f"evaluation: {each:.1f} min a checkpoint, {plan.checkpoints * each:.0f} min a seed; "
            f"{seeds} seeds: {all_hours:.1f} GPU hours"
        )
    return lines


def _size(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / MIB:.1f} MiB"
