"""CAPO's part of a checkpoint, `capo/state.safetensors`: the optimizer model's moments and the run's counters."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from open_r1_capo.runs.checkpoints import CheckpointError

VERSION = 1
STATE = "capo/state.safetensors"  # in a folder: vLLM loads every tensor file beside config.json

# accelerate calls the CPU of rank 1 cpu:1; torch.load, which the trainer asks to put its state there, knows cpu alone
torch.serialization.register_package(50, lambda data: None, lambda data, to: data if re.match(r"cpu:\d", to) else None)


def save_state(folder: Path, state: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Write a state dict (tensors, and the rest in the header) and numbers beside it, atomically."""
    tensors = {name: value.cpu().contiguous() for name, value in state.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    header = {"version": VERSION, "state": plain, "extra": numbers}
    (folder / STATE).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / (STATE + ".part"), metadata={"capo": json.dumps(header)})
    os.replace(folder / (STATE + ".part"), folder / STATE)


def load_state(folder: Path, load: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Read `save_state`'s file and hand state dict and numbers to `load`, whose ValueError says what does not fit.

    Raises:
        CheckpointError: the file is missing, unreadable, of another version, or of another model or other settings.
    """
    path = folder / STATE
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["capo"])
            version = header["version"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as CAPO's state ({error})") from None
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version} of CAPO's state, but this program reads {VERSION}")
    try:
        load(header["state"] | tensors, header["extra"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
