"""Which checkpoints of a run are complete.

Beside what the trainer writes, a complete checkpoint folder holds `complete.json`, written last: how many processes
wrote it, the size of every file and, for files up to 64 MB, its SHA-256. A folder without it, or that does not match
it, was cut off or damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from open_r1_capo.runs.exit import UserError

VERSION = 1
SEAL = "complete.json"
HASHED_BYTES = 64 * 2**20  # hashing tens of gigabytes at every save would cost more than it protects


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be continued."""


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint folder is named after."""
    return int(checkpoint.name.rpartition("-")[2])


def seal(folder: Path, processes: int = 1) -> None:
    """Declare a checkpoint folder complete by listing its files; written last and atomically.

    Args:
        folder: a checkpoint folder.
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


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint folder, in a few words; None if it is complete."""
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


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in `folder`, complete or not, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to resume from.

    Args:
        folder: holds `checkpoint-<step>` folders, or does not exist.

    Returns:
        The newest complete checkpoint (None if there is none) and a sentence for each newer one that is not.
    """
    skipped = []
    for path in reversed(checkpoint_folders(folder)):
        wrong = find_damage(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"{path} is not usable: {wrong}")
    return None, skipped


def check_processes(folder: Path, now: int, allowed: bool) -> str | None:
    """Refuse to resume with another number of processes: each draws its completions from its own random numbers.

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
