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
    """A checkpoint from which the run cannot go on."""


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint folder is named after."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in `folder`, complete or not, by step."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()), key=step_of)


def seal(folder: Path, processes: int = 1) -> None:
    """Mark a checkpoint folder, written by so many processes, as complete; the seal is written last, atomically."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    listing = {str(path.relative_to(folder)): _fingerprint(path) for path in files}
    part = folder / (SEAL + ".part")
    part.write_text(json.dumps({"version": VERSION, "processes": processes, "files": listing}, indent=1))
    os.replace(part, folder / SEAL)


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint folder, in a few words; None if it is complete."""
    try:
        listing = dict(json.loads((folder / SEAL).read_text())["files"])
    except FileNotFoundError:
        return "it was cut off while being written"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SEAL} is unreadable"
    for name, expected in listing.items():
        try:
            changed = _fingerprint(folder / name) != expected
        except OSError:
            return f"{name} is missing"
        if changed:
            return f"{name} has changed or is cut off"
    return None


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the checkpoint in `folder` to resume from: None if there is none; and a sentence for each unusable one."""
    skipped = []
    for path in reversed(checkpoint_folders(folder)):
        wrong = find_damage(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"{path} is not usable: {wrong}")
    return None, skipped


def check_processes(folder: Path, now: int, allowed: bool) -> str | None:
    """Refuse to resume with another number of processes: each draws its completions from its own random numbers.

    Returns:
        A sentence about what was `allowed`; None if the numbers are equal or the checkpoint does not say.

    Raises:
        CheckpointError: the numbers differ, and that is not allowed or, with DeepSpeed's shards, not possible.
    """
    before = json.loads((folder / SEAL).read_text()).get("processes", now)
    if before == now:
        return None
    difference = f"{folder} was written by {before} process{'es' if before > 1 else ''}, and this launch has {now}"
    if any(folder.glob("global_step*")):
        raise CheckpointError(f"{difference}: DeepSpeed's shards fit their own number alone, so launch {before}")
    if not allowed:
        raise CheckpointError(
            f"{difference}: they would draw other completions, so it would not be the same run; launch {before}, or "
            "accept that with allow_other_processes=true"
        )
    return f"{difference}: from here on it is not exactly the uninterrupted run"


def _fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > HASHED_BYTES:
        return {"bytes": size}
    return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
