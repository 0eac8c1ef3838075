"""Policies that are made on this machine: each an ordinary Hugging Face folder in one cache, checked at every use.

A folder appears in the cache by one rename, so that it is there whole or not at all, whatever stops the process that
makes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_r1_capo.runs.exit import UserError

CACHE_VARIABLE = "OPEN_R1_CAPO_CACHE"


class CacheError(UserError, RuntimeError):
    """A policy cannot be kept; the message says what to change."""


@dataclass(frozen=True)
class Policy:
    """A kind of policy: what it is called, its manifest's file name, and the megabytes that it needs."""

    what: str
    manifest: str
    megabytes: int

    def facts(self, folder: Path) -> dict[str, Any] | None:
        """What the manifest in a folder says; None without a readable one."""
        try:
            facts = json.loads((folder / self.manifest).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) else None

    def is_sound(self, folder: Path) -> bool:
        """Whether every file of the policy is there, byte for byte; files added later do not matter."""
        files = (self.facts(folder) or {}).get("files")
        try:
            return isinstance(files, dict) and bool(files) and files.items() <= self._digests(folder).items()
        except OSError:
            return False

    def make(self, folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
        """Let `fill` write a policy and return its facts, and move it to `folder` in one rename; no half stays.

        Raises:
            OSError: the folder cannot be written.
        """
        # The scratch folder comes first: a full or read-only disk should be known before the minutes of work.
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            made = scratch / "policy"
            made.mkdir()
            facts = fill(made)
            record = {**facts, "files": self._digests(made)}
            (made / self.manifest).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if folder.exists() and not self.is_sound(folder):
                print(f"{self.what}: {folder} is damaged, replacing it", file=sys.stderr, flush=True)
                os.replace(folder, scratch / "damaged")
            try:
                os.replace(made, folder)
            except OSError:
                if not self.is_sound(folder):  # otherwise another process was first: its policy is the same
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def keep(self, folder: Path, fill: Callable[[Path], dict[str, Any]]) -> Path:
        """`folder`, made by `fill` first if the cache does not have it whole; one process of a machine makes it.

        Raises:
            CacheError: the cache cannot be written (full disk, no permission).
        """
        from safetensors import SafetensorError

        if self.is_sound(folder):
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with self._one_maker(folder.parent / f".{folder.name}.lock"):
                if not self.is_sound(folder):
                    self.make(folder, fill)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CacheError(
                f"cannot keep the {self.what} in {folder.parent} ({reason}): free some space, or set "
                f"{CACHE_VARIABLE} to a folder that can be written and has {self.megabytes} MB free"
            ) from error
        return folder

    def _digests(self, folder: Path) -> dict[str, str]:
        """The SHA-256 of every file of a folder but the manifest."""
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != self.manifest)
        return {path.name: sha256(path) for path in files}

    @contextmanager
    def _one_maker(self, lock: Path) -> Iterator[None]:
        """Let one process of this machine make a policy while others wait; where files cannot be locked, all go on."""
        with lock.open("w") as handle:
            try:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"{self.what}: another process is making it, waiting", file=sys.stderr, flush=True)
                    fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:
                pass  # two makers then both work, and the rename still keeps the folder whole
            yield


def cache_root(cache_dir: Path | None = None) -> Path:
    """The cache folder: the argument, else ``$OPEN_R1_CAPO_CACHE``, else ``~/.cache/open_r1_capo``.

    Raises:
        CacheError: there is no home folder.
    """
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "open_r1_capo"
    except RuntimeError as error:
        raise CacheError(f"no home folder for the cache of policies: set {CACHE_VARIABLE} to a folder") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
