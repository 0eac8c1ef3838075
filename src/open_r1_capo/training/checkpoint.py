"""CAPO's part of a checkpoint, and whether a checkpoint is complete.

Beside what the trainer writes, a checkpoint folder holds `capo/state.safetensors` (the optimizer model's moments,
its settings and the run's counters) and, written last, `complete.json`: how many processes wrote it, the size of
every file and, for files up to 64 MB, its SHA-256. A folder without it, or that does not match it, was cut off or
damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from open_r1_capo.capo import AdamStep, SGDStep

VERSION = 1
STATE, SEAL = "capo/state.safetensors", "complete.json"  # in a folder: vLLM loads every tensor file beside config.json
HASHED_BYTES = 64 * 2**20  # hashing tens of gigabytes at every save would cost more than it protects

# accelerate calls the CPU of rank 1 cpu:1; torch.load, which the trainer asks to put its state there, knows cpu alone
torch.serialization.register_package(50, lambda data: None, lambda data, to: data if re.match(r"cpu:\d", to) else None)


class CheckpointError(ValueError):
    """A checkpoint cannot be continued; the message is one sentence for the user."""


def save_state(folder: Path, step_model: AdamStep | SGDStep, extra: dict[str, Any]) -> None:
    """Write the optimizer model's state, atomically.

    Args:
        folder: an existing checkpoint folder.
        step_model: its tensors are stored, its other state goes to the header.
        extra: numbers to keep beside it.
    """
    state = step_model.state_dict()
    tensors = {name: value.cpu().contiguous() for name, value in state.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    header = {"version": VERSION, "state": plain, "extra": extra}
    (folder / STATE).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / (STATE + ".part"), metadata={"capo": json.dumps(header)})
    os.replace(folder / (STATE + ".part"), folder / STATE)


def load_state(folder: Path, step_model: AdamStep | SGDStep) -> dict[str, Any]:
    """Read `save_state`'s file into `step_model`.

    Args:
        folder: a checkpoint folder.
        step_model: receives the state.

    Returns:
        The `extra` numbers.

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
        step_model.load_state_dict(header["state"] | tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return header["extra"]


def seal(folder: Path, processes: int = 1) -> None:
    """Declare a checkpoint folder complete by listing its files; written last and atomically.

    Args:
        folder: the checkpoint's.
        processes: how many wrote it.
    """
    listing = {
        str(path.relative_to(folder)): _fingerprint(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    (folder / (SEAL + ".part")).write_text(
        json.dumps({"version": VERSION, "processes": processes, "files": listing}, indent=1)
    )
    os.replace(folder / (SEAL + ".part"), folder / SEAL)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None if it is complete."""
    try:
        listing = json.loads((folder / SEAL).read_text())["files"]
    except FileNotFoundError:
        return "it was cut off while being written"
    except (OSError, ValueError, KeyError):
        return f"{SEAL} is unreadable"
    for name, expected in listing.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _fingerprint(path) != expected:
            return f"{name} has changed or is cut off"
    return None


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to resume from.

    Args:
        folder: holds `checkpoint-<step>` folders, or does not exist.

    Returns:
        The newest complete checkpoint (None if there is none) and a sentence for each newer one that is not.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    skipped = []
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        wrong = damage(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"{path} is not usable: {wrong}")
    return None, skipped


def check_processes(folder: Path, now: int, allowed: bool) -> str | None:
    """Refuse to go on with another number of processes: each draws its completions from random numbers of its own.

    Args:
        folder: a complete checkpoint.
        now: processes of this launch.
        allowed: whether the user accepts another run than the uninterrupted one.

    Returns:
        A sentence about what was accepted; None if the numbers are equal or the checkpoint does not tell.

    Raises:
        CheckpointError: the numbers differ, and that is not allowed or, with DeepSpeed's shards, not possible.
    """
    before = json.loads((folder / SEAL).read_text()).get("processes", now)
    if before == now:
        return None
    said = f"{folder} was written by {before} process{'es' if before > 1 else ''}, and this launch has {now}"
    if any(folder.glob("global_step*")):
        raise CheckpointError(f"{said}: DeepSpeed's shards fit their own number alone, so launch {before}")
    if not allowed:
        raise CheckpointError(
            f"{said}: they would draw other completions, so it would not be the same run; launch {before}, or accept "
            "that with allow_other_processes=true"
        )
    return f"{said}: from here on it is not exactly the uninterrupted run"


def _fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > HASHED_BYTES:
        return {"bytes": size}
    return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
