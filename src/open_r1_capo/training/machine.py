"""`fit_machine`: settings that a recipe leaves to the machine, and a word on every choice before the run starts."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import psutil
import torch
from transformers.utils import cached_file
from trl import GRPOConfig

from open_r1_capo.capacity import CapacityError
from open_r1_capo.capacity.devices import GIB, Device
from open_r1_capo.capacity.fit import largest_that_fits
from open_r1_capo.capacity.memory import memory_items, peaks
from open_r1_capo.capacity.workload import Machines, Workload, read
from open_r1_capo.runs.run import Run, RunError
from open_r1_capo.settings.batch import ACCUMULATION, MICRO, largest_micro_batch
from open_r1_capo.settings.budget import default_accelerator
from open_r1_capo.settings.run import FITTED, RunConfig
from open_r1_capo.settings.run import read as read_settings
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.tasks.source import POLICIES

CAREFUL = 4  # completions of a micro-batch where the model's memory cannot be computed
TRAINED = 12  # bytes of a weight's gradient and two moments in float32, of which LoRA has hardly any


class Fitted(NamedTuple):
    """Settings with those that were left to the machine, and what a step takes of its memory."""

    settings: dict[str, Any]
    memory: str = ""


def fit(settings: dict[str, Any], processes: int) -> Fitted:
    """Choose what `fit_machine` leaves open, as an earlier call of the run did; nothing without `fit_machine`.

    Raises:
        ConfigError: a recipe that cannot be used, or not even one completion fits into the memory.
    """
    if not settings.get("fit_machine"):
        return Fitted(settings)
    either = settings.get("use_vllm", False) is None
    settings = _as_begun(settings, processes) | {k: v for k, v in settings.items() if k != "use_vllm" or v is not None}
    cpu = settings.setdefault("use_cpu", not torch.cuda.is_available())
    settings.setdefault("bf16", not cpu and torch.cuda.is_bf16_supported())
    settings.setdefault("gradient_checkpointing", not cpu)
    if either:
        settings.setdefault("use_vllm", not cpu and importlib.util.find_spec("vllm") is not None)
    device = _device(cpu, processes)
    try:
        workload = _workload(settings, processes)
    except CapacityError as error:
        if not {MICRO, ACCUMULATION} & settings.keys():
            settings[MICRO] = largest_micro_batch(settings["completions_per_step"], processes, CAREFUL)
        return Fitted(settings, f"memory not computed: {error}")
    if settings.get("use_peft"):
        device = Device(device.name, device.memory + TRAINED * workload.shape.parameters)
    if not {MICRO, ACCUMULATION} & settings.keys():
        workload = workload.with_micro_batch(_micro_batch(workload, device))
        settings[MICRO] = workload.micro_batch
    need = max(peaks(memory_items(workload, device)).values())
    return Fitted(settings, f"about {need / GIB:.1f} of {device.memory / GIB:.1f} GiB")


def _as_begun(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """What an earlier call chose for the run: it goes on with the same, whatever memory is free now."""
    run, trl = read_settings(settings, processes)
    try:
        begun = {} if run.overwrite else Run(run.folder(trl["seed"])).settings
    except RunError:
        return {}
    return {key: value for key, value in begun.items() if key in FITTED}


def _device(cpu: bool, processes: int) -> Device:
    """The memory of one process; of several, what is the same for each, so that all choose alike."""
    if cpu:
        memory = psutil.virtual_memory()
        return Device("cpu", memory.available if processes == 1 else memory.total / processes)
    if processes == 1:
        return Device("gpu", torch.cuda.mem_get_info()[0])
    totals = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return Device("gpu", min(totals))


def _workload(settings: dict[str, Any], processes: int) -> Workload:
    """One completion a forward pass; raises CapacityError for a model of unknown shape."""
    alone = {MICRO: 1} if not {MICRO, ACCUMULATION} & settings.keys() else {}
    machines = Machines(processes, accelerator=default_accelerator(settings), cpu=settings["use_cpu"])
    return read(settings | alone | {"model_name_or_path": _local(settings)}, machines)


def _local(settings: dict[str, Any]) -> str | None:
    """The model's folder; of a hub id, the one in the cache that holds its config.json."""
    model = settings.get("model_name_or_path")
    if model in POLICIES:  # whose source knows its shape
        return model
    try:
        file = cached_file(model, "config.json")
    except (OSError, ValueError, TypeError):  # whatever is wrong with it, the loading of its tokenizer says
        return model
    return file.rpartition("/")[0] or model


def _micro_batch(workload: Workload, device: Device) -> int:
    largest = largest_that_fits(workload, device)
    if largest is None:
        need = max(peaks(memory_items(workload, device)).values())
        raise ConfigError(
            f"one completion at a time needs about {need / GIB:.1f} GiB, and {device.memory / GIB:.1f} GiB are free: "
            "set use_peft=true, a smaller model or max_completion_length, or per_device_train_batch_size=1 to try"
        )
    return largest


def choices(config: RunConfig, args: GRPOConfig, problems: str, memory: str) -> list[str]:
    """A line for each choice: what it is, and the settings that change it."""
    budget, more = config.budget, "" if torch.cuda.is_available() else ", as there is no GPU"
    nats = f"{budget.nats:g} nats" if budget.nats else f"{budget.entropy_share or 0:.2%} of the entropy"
    target = budget.rule == "target"
    step = f"KL budget of {nats}, no learning rate" if target else f"learning rate {args.learning_rate:g}"
    prompts = {None: "think, then \\boxed{}", "": "none"}
    rows = [
        ("device", f"CPU{more}" if args.use_cpu else "GPU", f"use_cpu={str(not args.use_cpu).lower()}"),
        ("precision", "bfloat16" if args.bf16 else "float32", f"bf16={str(not args.bf16).lower()}"),
        ("weights", "LoRA adapters" if config.use_peft else "all of them", "use_peft= lora_target_modules="),
        ("step", step, "RECIPE= budget.entropy_share=" if target else "RECIPE= learning_rate="),
        ("completions", f"{config.completions_per_step} a step", "completions_per_step= num_generations="),
        ("micro-batch", f"{args.per_device_train_batch_size}, {memory}", "per_device_train_batch_size="),
        ("generation", "vLLM" if args.use_vllm else "transformers", "generation="),
        ("length", f"up to {args.max_completion_length} tokens", "max_completion_length="),
        ("problems", problems, "data.path= data.problem_column= data.answer_column="),
        ("system prompt", prompts.get(config.system_prompt, "own"), "system_prompt="),
        ("reward", ", ".join(config.reward_funcs), "reward=<python file>:<function> reward_funcs="),
        ("steps", f"{args.max_steps}, saved every {args.save_steps:g}", "max_steps= save_steps= save_strategy=no"),
    ]
    return [f"  {name:<14} {value}  ({change})" for name, value, change in rows]
