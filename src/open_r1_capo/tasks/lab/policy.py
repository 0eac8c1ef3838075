"""The lab policy as a folder: made on first use, kept in a cache, and checked each time.

The folder is an ordinary Hugging Face model (`AutoModelForCausalLM`, `AutoTokenizer`, vLLM). It appears in the cache
by one rename, so that it is there whole or not at all, whatever stops the process that makes it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from open_r1_capo.runs.exit import UserError
from open_r1_capo.tasks.lab import pretrain, task, tokenizer
from open_r1_capo.tasks.lab import settings as lab_settings
from open_r1_capo.tasks.lab.settings import LabSettings

CACHE_VARIABLE = "OPEN_R1_CAPO_CACHE"
MANIFEST = "lab.json"


class LabError(UserError, RuntimeError):
    """The lab policy cannot be made or kept; the message says what to change."""


def cache_key(settings: LabSettings, seed: int) -> str:
    """Name a policy by everything that determines it, the code and the versions of torch and transformers too."""
    modules = (task, tokenizer, pretrain, lab_settings)
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    facts = [dataclasses.asdict(settings), seed, sources, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def _cache_root(cache_dir: Path | None) -> Path:
    """The cache folder: the argument, else the environment's, else one in the user's home."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "open_r1_capo"
    except RuntimeError as error:
        raise LabError(f"no home folder for the lab policy's cache: set {CACHE_VARIABLE} to a folder") from error


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder but the manifest."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_sound(folder: Path) -> bool:
    """Whether every file of a cached policy is there, byte for byte; files added later do not matter."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(recorded) and recorded.items() <= _digests(folder).items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _one_maker(lock: Path) -> Iterator[None]:
    """Let one process of this machine make a policy while others wait; where files cannot be locked, all go on."""
    with lock.open("w") as handle:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("lab policy: another process is making it, waiting", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # two makers then both work, and the rename still keeps the folder whole
        yield


def _make(folder: Path, settings: LabSettings, seed: int) -> None:
    """Train a policy and move it to its folder in one rename; nothing half-written stays."""
    # The scratch folder comes first: a full or read-only disk should be known before the minutes of training.
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made = scratch / "policy"
        tok = tokenizer.build_tokenizer(settings.max_length, settings.mixture.filler_tokens)
        started = time.process_time()
        pretrain.pretrain(settings, tok, seed).save_pretrained(made)
        tok.save_pretrained(made)
        facts = {"seed": seed, "settings": dataclasses.asdict(settings), "files": _digests(made)}
        record = facts | {"processor_seconds": round(time.process_time() - started)}
        (made / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists() and not is_sound(folder):
            print(f"lab policy: {folder} is damaged, replacing it", file=sys.stderr, flush=True)
            os.replace(folder, scratch / "damaged")
        try:
            os.replace(made, folder)
        except OSError:
            if not is_sound(folder):  # otherwise another process was first: its policy is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def base_policy(seed: int = 0, cache_dir: Path | None = None, settings: LabSettings | None = None) -> Path:
    """The folder of the pretrained lab policy, trained first (two minutes) where the cache does not have it.

    It is a Hugging Face model folder with tokenizer, and shared: write nothing into it. The cache is `cache_dir`,
    else ``$OPEN_R1_CAPO_CACHE``, else ``~/.cache/open_r1_capo``.

    Raises:
        LabError: If the cache cannot be written (full disk, no permission, no home).
    """
    settings = settings or LabSettings()
    root = _cache_root(cache_dir)
    folder = root / f"policy-{cache_key(settings, seed)}"
    if is_sound(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _one_maker(root / f".{folder.name}.lock"):
            if not is_sound(folder):
                _make(folder, settings, seed)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LabError(
            f"cannot keep the lab policy in {root} ({reason}): free some space, or set {CACHE_VARIABLE} to a "
            "folder that can be written and has 10 MB free"
        ) from error
    return folder
